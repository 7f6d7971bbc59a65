//! A heap: a space, the engine's arenas over it, and who uses which.
//!
//! ```text
//!  malloc ── automatic arena of the thread ──┐
//!         └─ an arena on extents ───────────┴─ hooks ── space ── pool ◄── service ◄── source
//! ```

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use core::time::Duration;
use std::sync::OnceLock;
use std::time::Instant;

use crate::arena::{self, ArenaBuilder, callbacks};
use crate::config::Config;
use crate::engine::{self, ArenaIndex, Hooks, MAX_REQUEST, Supply};
use crate::fork;
use crate::headroom::headroom;
use crate::over_time::OverTime;
use crate::placement::{OnExhausted, Placement};
use crate::service::Service;
use crate::shared;
use crate::sigbus;
use crate::source::{ExtentSource, Ranges, WindowRange};
use crate::space::{Fate, GRANULE, Lot, Owner, PAGE, Space, Tier, present};
use crate::spill::{self, ReadError, SpillState};
use crate::stats::Stats;
use crate::sync::{Guard, Lock, Signal};

/// From so many bytes on, which the engine's thread caches do not hold, a
/// request is watched: it waits for extents rather than take DRAM, and does
/// not fail for what other arenas have freed and not given back.
const CAREFUL_FROM: usize = (32 << 10) + 1;
/// The smallest alignment that direct I/O asks for: a disk's sector.
const IO_ALIGN: usize = 512;
/// jemalloc's own default, for DRAM.
const DRAM_DECAY_MS: isize = 10_000;
/// How long a small allocation waits for granules that have been asked for: a
/// broker takes a tenth of a millisecond, its turn on a busy processor longer.
/// Once it was in vain, nobody waits until the broker has answered.
const ON_ITS_WAY_MS: u32 = 100;
/// How long an allocation waits for an answer of a source that has not said
/// that it is exhausted. A broker answers in well under a millisecond; this
/// only bounds what a broker that hangs can do to a program.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Arenas of the tier that the engine's automatic ones are not of, made when
/// first needed; a thread takes that of the processor it runs on.
struct Extra {
    slots: [AtomicU32; engine::MAX_ARENAS],
    making: Lock<()>,
}

impl Extra {
    const fn new() -> Self {
        Self {
            slots: [const { AtomicU32::new(0) }; engine::MAX_ARENAS],
            making: Lock::new(()),
        }
    }

    fn made(&self) -> impl Iterator<Item = ArenaIndex> + '_ {
        self.slots
            .iter()
            .filter_map(|slot| ArenaIndex::from_slot(slot.load(Ordering::Acquire)))
    }
}

/// Finds a source for a forked child. Called on a thread of the heap's own,
/// which may then have a descriptor table of its own.
pub type Reconnect = fn() -> Option<&'static dyn ExtentSource>;

/// A heap for a whole process. It has no address and no thread until
/// [`Heap::start`]; from then on it stays where it is.
pub struct Heap {
    space: Space,
    hooks: OnceLock<[Hooks; 2]>,
    extra: Extra,
    config: OnceLock<Config>,
    /// Requests below this many bytes go to the engine's automatic arenas …
    threshold: AtomicUsize,
    /// … and below this, nothing has to be done when they fail.
    direct_below: AtomicUsize,
    service: Service,
    supply: Supply,
    exhausted: AtomicU64,
    evacuated: AtomicU64,
    promoted: AtomicU64,
    restored: AtomicU64,
    spill_lost: AtomicU64,
    spill_state: AtomicU32,
    /// System calls that meet a granule in flight fail.
    user_moves: AtomicBool,
    forks: Lock<()>,
    /// Live granules that forks left out.
    unforked: AtomicU64,
    over_time: OverTime,
    foreign: AtomicU64,
    reconnect: OnceLock<Reconnect>,
    unknown_settings: AtomicU32,
}

impl Default for Heap {
    fn default() -> Self {
        Self::new()
    }
}

impl Heap {
    /// A heap that has not started.
    pub const fn new() -> Self {
        Self {
            space: Space::new(),
            hooks: OnceLock::new(),
            extra: Extra::new(),
            config: OnceLock::new(),
            threshold: AtomicUsize::new(usize::MAX),
            direct_below: AtomicUsize::new(usize::MAX),
            service: Service::new(),
            supply: Supply::new(fork::child_needs_extents),
            exhausted: AtomicU64::new(0),
            evacuated: AtomicU64::new(0),
            promoted: AtomicU64::new(0),
            restored: AtomicU64::new(0),
            spill_lost: AtomicU64::new(0),
            spill_state: AtomicU32::new(0),
            user_moves: AtomicBool::new(false),
            forks: Lock::new(()),
            unforked: AtomicU64::new(0),
            over_time: OverTime::new(),
            foreign: AtomicU64::new(0),
            reconnect: OnceLock::new(),
            unknown_settings: AtomicU32::new(0),
        }
    }

    /// Starts the heap with its settings; until a source is attached, what
    /// asks for extents gets DRAM. `false`: it has been started already, or
    /// no addresses are to be had, and allocations stay with the engine.
    pub fn start(&'static self, config: Config) -> bool {
        if self.config.set(config).is_err() || self.space.open().is_err() {
            return false;
        }
        if let Placement::Interleave(n) = config.placement {
            self.space.set_interleave(n);
        }
        let hooks = |tier: Tier| Hooks::new(&self.space, tier.into(), &self.supply, None);
        let hooks = self
            .hooks
            .get_or_init(|| [hooks(Tier::Dram), hooks(Tier::Extent)]);
        let tier = config.placement.bound_tier();
        engine::take_over(&hooks[tier as usize], self.decay_ms(tier));
        let threshold = engine::whole_class(config.placement.direct_below());
        self.threshold.store(threshold, Ordering::Release);
        let direct = threshold.min(CAREFUL_FROM);
        self.direct_below.store(direct, Ordering::Release);
        fork::register_early(self);
        self.over_time.begin();
        true
    }

    /// Attaches the source of extents and starts the thread that talks to it.
    /// Returns when the first granules are there, or the source has none.
    ///
    /// # Errors
    /// The kernel's, if there is no memory for tables or a thread.
    pub fn attach(
        &'static self,
        source: &'static dyn ExtentSource,
    ) -> Result<(), rustix::io::Errno> {
        let (addr, len) = source.window();
        // SAFETY: the window is as `ExtentSource::window` promises.
        unsafe { self.space.open_window(addr, len) }?;
        if source.window_is_device() {
            present::window_is_a_device();
        }
        self.service.start(self, source)?;
        sigbus::install(self);
        shared::attached(self);
        self.expect_extents();
        if self.config().placement.bound_tier() == Tier::Extent {
            self.wait_for_extents(1, ANSWER_WITHIN);
        }
        Ok(())
    }

    /// Says how a forked child finds a source of its own; without that, its
    /// heap stays in DRAM.
    pub fn set_reconnect(&self, reconnect: Reconnect) {
        let _ = self.reconnect.set(reconnect);
    }

    pub(crate) fn reconnect(&self) -> Option<&'static dyn ExtentSource> {
        self.reconnect.get().and_then(|reconnect| reconnect())
    }

    /// What `on_exhausted` says holds from now on: there is a source.
    pub(crate) fn expect_extents(&self) {
        let policy = self.config().on_exhausted;
        let (patience, insist) = match policy {
            OnExhausted::Wait(ms) => (ms, true),
            _ => (ON_ITS_WAY_MS, false),
        };
        self.supply.patience_ms.store(patience, Ordering::Relaxed);
        self.supply.insist.store(insist, Ordering::Relaxed);
        self.space
            .set_dram_when_exhausted(policy == OnExhausted::Dram);
    }

    /// Nobody waits for extents: none will come.
    pub(crate) fn expect_none(&self) {
        self.supply.patience_ms.store(0, Ordering::Relaxed);
        self.supply.insist.store(false, Ordering::Relaxed);
    }

    /// The settings.
    pub fn config(&self) -> &Config {
        self.config.get().unwrap_or(&Config::DEFAULT)
    }

    /// The space under this heap.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Whether [`Heap::start`] has been called.
    pub fn is_started(&self) -> bool {
        self.config.get().is_some()
    }

    pub(crate) fn service(&self) -> &Service {
        &self.service
    }

    pub(crate) fn wanted(&self) -> &Signal {
        &self.supply.wanted
    }

    /// Granules of a lot that waiting threads lack.
    pub(crate) fn demand(&self, lot: Lot) -> &AtomicUsize {
        &self.supply.demand[lot.index()]
    }

    /// Raised whenever the source has answered.
    pub(crate) fn lent(&self) -> &Signal {
        &self.supply.lent
    }

    /// Remembers how many settings could not be read.
    pub fn note_unknown_settings(&self, count: u32) {
        self.unknown_settings.store(count, Ordering::Relaxed);
    }

    /// Requests of fewer bytes than this may go straight to [`engine::malloc`]:
    /// it serves them from the right memory, and does not fail for want of
    /// extents.
    pub fn direct_below(&self) -> usize {
        self.direct_below.load(Ordering::Relaxed)
    }

    pub(crate) fn supply(&self) -> &Supply {
        &self.supply
    }

    pub(crate) fn decay_ms(&self, tier: Tier) -> isize {
        match tier {
            Tier::Dram => DRAM_DECAY_MS,
            Tier::Extent => self.config().decay_ms as isize,
        }
    }

    /// An arena for a request that the automatic ones don't serve.
    fn extra_arena(&'static self, tier: Tier) -> Option<ArenaIndex> {
        let cpu = rustix::thread::sched_getcpu();
        let slot = &self.extra.slots[cpu % engine::MAX_ARENAS];
        let made = || ArenaIndex::from_slot(slot.load(Ordering::Acquire));
        if let Some(arena) = made() {
            return Some(arena);
        }
        let hooks: &'static Hooks = &self.hooks.get()?[tier as usize];
        let _making = self.extra.making.lock();
        if let Some(arena) = made() {
            return Some(arena);
        }
        let arena = ArenaIndex::create(hooks, self.decay_ms(tier))?;
        slot.store(arena.to_slot(), Ordering::Release);
        Some(arena)
    }

    /// An arena of its own for a part of the program, to be made with
    /// [`ArenaBuilder::build`].
    ///
    /// ```
    /// use allocator::{DcMalloc, allocator_api2::vec::Vec};
    ///
    /// static HEAP: DcMalloc = DcMalloc::new();
    ///
    /// fn main() -> Result<(), allocator::ArenaError> {
    ///     let wanted = |pressure: &allocator::Pressure| println!("{} wanted", pressure.bytes);
    ///     let arena = HEAP.arena("index").limit(64 << 20).on_pressure(wanted).build()?;
    ///     let mut numbers = Vec::new_in(arena.clone());
    ///     numbers.extend(0..1_000_000u32);
    ///     assert!(arena.stats().pages >= 4_000_000);
    ///     Ok(())
    /// }
    /// ```
    pub fn arena(&'static self, name: &str) -> ArenaBuilder {
        ArenaBuilder::new(self, name)
    }

    /// Lets freed pages of extents go whose time has come.
    pub(crate) fn decay_extents(&self) {
        self.extent_arenas().for_each(engine::decay);
        arena::table().each_on_extents(self, engine::decay);
    }

    /// Lets all freed pages of extents go.
    pub(crate) fn purge_extents(&self) {
        self.extent_arenas().for_each(engine::purge);
        arena::table().each_on_extents(self, engine::purge);
    }

    /// The heap's own arenas that take extents.
    fn extent_arenas(&self) -> impl Iterator<Item = ArenaIndex> + '_ {
        let bound = self.config().placement.bound_tier();
        let automatic = bound == Tier::Extent && self.is_started();
        let extra = bound == Tier::Dram;
        engine::automatic()
            .filter(move |_| automatic)
            .chain(self.extra.made().filter(move |_| extra))
    }

    /// The tier that serves a request. What looks like a buffer for direct I/O
    /// goes to DRAM: a transfer that is under way can't follow a move.
    fn tier(&self, size: usize, align: usize) -> Tier {
        let config = self.config();
        if config.io_dram && align >= IO_ALIGN && size >= PAGE {
            return Tier::Dram;
        }
        match size < self.threshold.load(Ordering::Relaxed) {
            true => config.placement.bound_tier(),
            false => Tier::Extent,
        }
    }

    /// `size` bytes aligned to `align` (a power of two), zeroed if asked; null
    /// if there is no memory. A size of 0 is served as 1.
    pub fn allocate(&'static self, size: usize, align: usize, zero: bool) -> *mut u8 {
        let size = size.max(1);
        self.serve(size, align, |arena| match arena {
            Some(arena) => engine::allocate_from(arena, size, align, zero),
            None => engine::allocate(size, align, zero),
        })
    }

    /// Gives an allocation another size, perhaps at another address; null if
    /// there is no memory, and then it is as it was.
    ///
    /// # Safety
    /// `ptr` is live and from this heap, `align` a power of two.
    pub unsafe fn reallocate(&'static self, ptr: *mut u8, size: usize, align: usize) -> *mut u8 {
        let size = size.max(1);
        self.serve(size, align, |arena| match arena {
            // SAFETY: the caller's promise, and the size is not 0.
            Some(arena) => unsafe { engine::reallocate_into(arena, ptr, size, align) },
            // SAFETY: as above.
            None => unsafe { engine::reallocate(ptr, size, align) },
        })
    }

    /// Tries, and where extents have run out waits for some and tries again.
    fn serve(
        &'static self,
        size: usize,
        align: usize,
        attempt: impl Fn(Option<ArenaIndex>) -> *mut u8,
    ) -> *mut u8 {
        if size > MAX_REQUEST {
            return core::ptr::null_mut();
        }
        let tier = self.tier(size, align);
        let automatic = tier == self.config().placement.bound_tier();
        let arena = if automatic {
            None
        } else {
            self.extra_arena(tier)
        };
        let mut ptr = if tier == Tier::Extent && self.is_started() {
            let ptr = engine::lent_only(|| attempt(arena));
            if ptr.is_null() {
                self.serve_short(size, || attempt(arena))
            } else {
                ptr
            }
        } else {
            attempt(arena)
        };
        if ptr.is_null() && self.space.has_room_for(size / GRANULE + 1) {
            // Other arenas may hold what was freed in them for some time yet.
            self.purge();
            ptr = match self.config().on_exhausted {
                OnExhausted::Dram => attempt(arena),
                _ => engine::lent_only(|| attempt(arena)),
            };
        }
        ptr
    }

    /// Waits for extents and tries again; what `on_exhausted` says if there
    /// are none.
    #[cold]
    fn serve_short(&'static self, size: usize, attempt: impl Fn() -> *mut u8) -> *mut u8 {
        let granules = size.div_ceil(GRANULE);
        let policy = self.config().on_exhausted;
        let patience = match policy {
            OnExhausted::Wait(ms) => Duration::from_millis(u64::from(ms)),
            _ => ANSWER_WITHIN,
        };
        let deadline = Instant::now() + patience;
        while self.space.has_room_for(granules) {
            let left = deadline.saturating_duration_since(Instant::now());
            let more = self.wait_for_extents(granules, left);
            let ptr = engine::lent_only(&attempt);
            if !ptr.is_null() {
                return ptr;
            }
            let taken = self.space.idle_granules() < granules;
            let waits = matches!(policy, OnExhausted::Wait(_));
            // Where enough is left it is not for want of extents that it failed.
            if left.is_zero() || !taken || !(more || waits) {
                break;
            }
        }
        match policy {
            OnExhausted::Dram => attempt(),
            _ => core::ptr::null_mut(),
        }
    }

    /// Waits until `granules` are unused. `false`: there are no more for now
    /// (placement falls back to DRAM if the policy is so), or time is up.
    fn wait_for_extents(&'static self, granules: usize, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let waits = matches!(self.config().on_exhausted, OnExhausted::Wait(_));
        let refusals = self.space.refusals();
        loop {
            let seen = self.supply.lent.read();
            if self.space.idle_granules() >= granules {
                return true;
            }
            // Said each time round, since another thread may have taken what
            // came; but while there is none, only news of more is waited for.
            let joining = self.service.is_joining();
            let ask = joining || !self.space.is_exhausted();
            if !joining && !self.service.is_running() {
                self.space.set_exhausted(true);
                // A child may have found its source just now.
                if self.service.is_running() {
                    self.space.set_exhausted(false);
                }
            }
            // A refusal may be over by now, because others gave some back; it
            // was the answer to this request all the same. A child that is to
            // have no DRAM waits until it is known whether there is a source.
            let refused = match joining {
                true => self.config().on_exhausted == OnExhausted::Dram,
                false => self.space.is_exhausted() || self.space.refusals() != refusals,
            };
            if refused && !waits {
                self.exhausted.fetch_add(1, Ordering::Relaxed);
                return false;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.supply.lose_patience(&self.space, Lot::UNTAGGED);
                return false;
            }
            if ask {
                self.supply.want(granules, Lot::UNTAGGED);
            }
            self.supply.lent.wait(seen, left);
        }
    }

    /// Makes all arenas give back what is free.
    pub(crate) fn purge(&self) {
        engine::automatic()
            .chain(self.extra.made())
            .for_each(engine::purge);
        arena::table().each_on_extents(self, engine::purge);
    }

    /// Gives back what is unused; whether there was any.
    pub fn trim(&'static self) -> bool {
        let before = self.space.usage();
        self.purge();
        self.service.trim(self);
        self.space.usage() != before
    }

    /// What the heap holds.
    pub fn stats(&self) -> Stats {
        let engine = engine::statistics();
        let usage = self.space.usage();
        let (live_over_time, extents_over_time) = self.over_time.sums();
        let mut stats = Stats {
            usage,
            outside: engine::early_bytes(),
            live_over_time,
            extents_over_time,
            allocated: engine.allocated,
            metadata: engine.metadata,
            arenas: (engine::automatic().count()
                + self.extra.made().count()
                + arena::table().count()) as u32,
            pinned: self.space.pinned_bytes(),
            lost: self.space.lost_bytes(),
            callback_panics: callbacks().panics(),
            exhausted: self.exhausted.load(Ordering::Relaxed),
            evacuated: self.evacuated.load(Ordering::Relaxed),
            promoted: self.promoted.load(Ordering::Relaxed),
            unforked: self.unforked.load(Ordering::Relaxed),
            foreign: self.foreign.load(Ordering::Relaxed),
            restored: self.restored.load(Ordering::Relaxed),
            spill_lost: self.spill_lost.load(Ordering::Relaxed),
            user_moves: self.user_moves.load(Ordering::Relaxed),
            spill: match self.spill_state.load(Ordering::Relaxed) {
                1 => SpillState::Unusable,
                2 => SpillState::NoRing,
                3 => SpillState::Ring,
                _ => SpillState::Off,
            },
            unknown_settings: self.unknown_settings.load(Ordering::Relaxed),
            ..Stats::default()
        };
        self.service.count(&mut stats);
        stats
    }

    /// Whether a block may be of this heap: it lies where the heap has memory.
    /// Of a heap that has not started nothing is known, and the answer is yes.
    #[inline]
    pub fn may_own(&self, addr: usize) -> bool {
        self.space.has_backing(addr) || !self.is_started() || engine::is_early(addr)
    }

    /// Counts a block that was to be freed or resized here, and is not of this
    /// heap; whether it is the first.
    pub fn note_foreign(&self) -> bool {
        self.foreign.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// Counts what is held now for the time since it was last counted, and has
    /// the source show what there is to say.
    pub(crate) fn report_to(&self, source: &dyn ExtentSource) {
        self.over_time
            .sample(&self.space.usage(), engine::early_bytes());
        source.publish(&self.stats());
    }

    /// Says for the last time what the heap holds: the process ends.
    pub fn publish(&'static self) {
        self.service.publish(self);
    }

    /// Whether what is lost of an owner reads as zeroes: somebody is told, or
    /// nobody wants to be.
    pub(crate) fn zeroes_lost(&self, owner: Owner) -> bool {
        self.config().zero_lost || arena::table().hears(owner)
    }

    /// Takes what is in use off extents that are gone, and tells whose it is;
    /// the extents that nothing maps any more. Call again until there are none.
    pub(crate) fn lose(&self, gone: &[WindowRange]) -> Ranges {
        self.space.lose(gone, |owner| {
            arena::table().note_lost(owner, GRANULE as u64);
            match self.zeroes_lost(owner) {
                true => Fate::Zero,
                false => Fate::Fault,
            }
        })
    }

    /// Bytes of DRAM that granules may still move to: within `dram_limit`, and
    /// within what the control group allows.
    pub(crate) fn dram_allowance(&self) -> u64 {
        let held = self.space.usage().dram_held;
        self.config()
            .dram_limit
            .saturating_sub(held)
            .min(headroom())
    }

    /// Bytes that may still be spilled.
    pub(crate) fn spill_allowance(&self) -> u64 {
        let spilled = self.space.usage().spilled;
        self.config().spill_limit.saturating_sub(spilled)
    }

    pub(crate) fn note_user_moves(&self, yes: bool) {
        self.user_moves.store(yes, Ordering::Relaxed);
    }

    pub(crate) fn note_spill(&self, state: SpillState) {
        self.spill_state.store(state as u32, Ordering::Relaxed);
    }

    pub(crate) fn note_restored(&self, granules: usize) {
        self.restored.fetch_add(granules as u64, Ordering::Relaxed);
    }

    /// A granule did not come back. Said on stderr whatever `verbose` says:
    /// whoever touches it is about to get SIGBUS.
    pub(crate) fn note_spill_lost(&self, error: ReadError) {
        self.spill_lost.fetch_add(1, Ordering::Relaxed);
        spill::complain(error);
    }

    /// Granules that may come back to extents in one tick of the worker: all of
    /// them in a `hurry`, unless nothing ever does.
    pub(crate) fn back_per_tick_in(&self, hurry: bool) -> usize {
        if hurry && self.config().promote > 0 {
            return usize::MAX;
        }
        let ticks = 1000 / crate::service::TICK.as_millis() as u64;
        (self.config().promote / ticks).div_ceil(GRANULE as u64) as usize
    }

    pub(crate) fn note_evacuated(&self, granules: usize) {
        self.evacuated.fetch_add(granules as u64, Ordering::Relaxed);
    }

    /// Granules that were moved so far, anywhere.
    pub(crate) fn moved(&self) -> u64 {
        let counters = [&self.evacuated, &self.promoted, &self.restored];
        counters.map(|n| n.load(Ordering::Relaxed)).iter().sum()
    }

    pub(crate) fn note_promoted(&self, granules: usize) {
        self.promoted.fetch_add(granules as u64, Ordering::Relaxed);
    }

    /// Before a fork: all of the heap is made memory that a child inherits.
    pub(crate) fn before_fork(&'static self) {
        core::mem::forget(self.forks.lock());
        self.service.stop(self);
        let left_out = self.space.live_bytes_in(&[]) / GRANULE as u64;
        self.unforked.fetch_add(left_out, Ordering::Relaxed);
        // Held while an arena is made, which takes the engine's locks.
        core::mem::forget(self.extra.making.lock());
        arena::table().before_fork();
    }

    /// After a fork, in the parent.
    ///
    /// # Safety
    /// The calling thread called [`Heap::before_fork`].
    pub(crate) unsafe fn in_parent(&'static self) {
        // SAFETY: this thread took them in `before_fork`.
        unsafe {
            arena::table().after_fork();
            self.extra.making.force_unlock();
        }
        self.service.resume(self);
        // SAFETY: as above.
        unsafe { self.forks.force_unlock() };
    }

    /// Keeps forks away while the guard lives.
    pub fn no_fork(&self) -> Guard<'_, ()> {
        self.forks.lock()
    }

    /// In a forked child: its parent's service, leases and counts are not its
    /// own. It looks for a source when it first needs an extent.
    pub(crate) fn in_child(&self) {
        let line = self.service.forget();
        callbacks().forget();
        arena::table().in_child();
        self.expect_none();
        self.space.set_dram_when_exhausted(true);
        self.space.disown_extents(line);
        self.space.set_extents_closed(false);
        self.over_time.begin();
        for demand in &self.supply.demand {
            demand.store(0, Ordering::Relaxed);
        }
        for counter in [
            &self.exhausted,
            &self.evacuated,
            &self.promoted,
            &self.restored,
            &self.spill_lost,
            &self.unforked,
        ] {
            counter.store(0, Ordering::Relaxed);
        }
        let orphan = self.reconnect.get().is_some();
        self.supply.orphan.store(orphan, Ordering::Release);
        // SAFETY: the copy of the thread that took them in `before_fork`.
        unsafe {
            arena::table().after_fork();
            self.extra.making.force_unlock();
            self.forks.force_unlock();
        }
    }
}
