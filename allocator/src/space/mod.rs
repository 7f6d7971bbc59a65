//! The address space that heaps live in: 2 MiB granules, each with a backing.
//!
//! ```text
//!  base                                            base + reserved
//!   ├── granule 0 ──┼── granule 1 ──┼── granule 2 ──┼── … ──┤
//!   │ Extent(0x0)   │ Extent(2M)    │ Dram          │ None  │    backing
//!   │ ████░░████░░  │ ████████████  │ ██░░░░░░░░░░  │       │    live pages
//! ```
//! The engine asks for runs of pages and returns pieces of any size; both are
//! booked here, page by page, in tables that live in DRAM (a lost extent must
//! not hurt the heap's own structures). A granule with nothing live goes back
//! to its lender.
//!
//! Nothing in here waits for a lender, allocates, formats or logs: it runs
//! under locks of the engine. The only lock is the space's own, a leaf.

mod backing;
mod granule;
mod losing;
mod lots;
mod map;
mod moving;
mod pagemap;
mod pinning;
mod pool;
pub(crate) mod present;
pub mod rebind;
mod sharing;
mod spilled;
mod table;

use core::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};
use rustix::io::Errno;

pub use granule::{Backing, Domain, GRANULE, NO_LINE, Owner, PAGE, PAGES_PER_GRANULE, Tier};
pub(crate) use losing::Fate;
pub use lots::{LOTS, Lot};
pub use map::keep_private;
pub(crate) use map::table as map_table;
pub use moving::{Ended, Leaving, Move};
pub use pagemap::PageMap;
pub use pinning::MAX_PINS;
pub(crate) use pinning::{Pinned, TryPin};

use crate::source::{Ranges, SharedRun, WindowRange};
use crate::sync::Lock;
use pool::wants;
use table::State;

/// Addresses reserved where the limits of the process allow it; the table for
/// it takes 24 MiB of addresses and is touched as it is used.
const RESERVE: usize = 256 << 30;
/// Below this a space is not worth having.
const RESERVE_MIN: usize = 64 << 20;

/// Values of [`Space::low`].
const FINE: u8 = 0;
const SHORT: u8 = 1;
const TOLD: u8 = 2;

/// What the space holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Usage {
    /// In use by the engine, on extents.
    pub extent_live: u64,
    /// In use by the engine, in DRAM.
    pub dram_live: u64,
    /// Granules on extents, leased granules that wait in the pool included.
    pub extent_held: u64,
    /// Granules in DRAM.
    pub dram_held: u64,
    /// Of `extent_held`: leased and unused, mapped or not.
    pub idle: u64,
    /// In use by the engine, on extents of an ancestor that forked: copied to
    /// DRAM when it is touched.
    pub inherited: u64,
    /// In use by the engine, in the file.
    pub spilled: u64,
    /// Granules of which the content is in the file.
    pub spilled_held: u64,
    /// The most that all in use by the engine ever was.
    pub live_peak: u64,
    /// What `extent_live + inherited` was at that moment.
    pub extent_live_at_peak: u64,
    /// The most that `extent_live` ever was.
    pub extent_live_peak: u64,
    /// The most that `dram_live` ever was.
    pub dram_live_peak: u64,
    /// The most that `extent_held` ever was.
    pub extent_held_peak: u64,
    /// The most that `dram_held` ever was.
    pub dram_held_peak: u64,
}

impl Usage {
    /// Nothing.
    pub const NEW: Self = Self {
        extent_live: 0,
        dram_live: 0,
        extent_held: 0,
        dram_held: 0,
        idle: 0,
        inherited: 0,
        spilled: 0,
        spilled_held: 0,
        live_peak: 0,
        extent_live_at_peak: 0,
        extent_live_peak: 0,
        dram_live_peak: 0,
        extent_held_peak: 0,
        dram_held_peak: 0,
    };

    /// Remembers the highest water.
    fn note_peaks(&mut self) {
        let on_extents = self.extent_live + self.inherited;
        let live = on_extents + self.dram_live + self.spilled;
        if live > self.live_peak {
            self.live_peak = live;
            self.extent_live_at_peak = on_extents;
        }
        self.extent_live_peak = self.extent_live_peak.max(self.extent_live);
        self.dram_live_peak = self.dram_live_peak.max(self.dram_live);
        self.extent_held_peak = self.extent_held_peak.max(self.extent_held);
        self.dram_held_peak = self.dram_held_peak.max(self.dram_held);
    }
}

/// A reserved range of addresses and what backs it.
pub struct Space {
    state: Lock<State>,
    /// The lender has no more of a lot, a bit for each: take DRAM instead of
    /// failing, if allowed.
    exhausted: AtomicU32,
    /// How often `exhausted` was set.
    refusals: AtomicU32,
    /// Whether DRAM is taken where no lent granule is unused.
    dram_when_exhausted: AtomicBool,
    /// Whether unused granules are short: `FINE`, `SHORT` or `TOLD`.
    low: AtomicU8,
    /// Pins of another epoch are void.
    pin_epoch: AtomicU32,
    /// Bytes of granules whose content was lost to a device.
    lost: AtomicU64,
    /// For [`Space::owner_of`], written once.
    owners: AtomicPtr<AtomicU16>,
    base: AtomicUsize,
    granules: AtomicUsize,
}

/// A run of pages for the engine.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Its address.
    pub addr: usize,
    /// Every byte of it is zero.
    pub zeroed: bool,
}

impl Default for Space {
    fn default() -> Self {
        Self::new()
    }
}

impl Space {
    /// A space that has reserved nothing yet.
    pub const fn new() -> Self {
        Self {
            state: Lock::new(State::NEW),
            exhausted: AtomicU32::new(u32::MAX),
            refusals: AtomicU32::new(0),
            dram_when_exhausted: AtomicBool::new(true),
            low: AtomicU8::new(FINE),
            pin_epoch: AtomicU32::new(0),
            lost: AtomicU64::new(0),
            owners: AtomicPtr::new(core::ptr::null_mut()),
            base: AtomicUsize::new(0),
            granules: AtomicUsize::new(0),
        }
    }

    /// Reserves the addresses: as many as the limits of the process allow
    /// (`RLIMIT_AS`), at most 256 GiB. Calling it again does nothing.
    ///
    /// # Errors
    /// The kernel's, if not even 64 MiB are to be had.
    pub fn open(&self) -> Result<(), Errno> {
        let mut state = self.state.lock();
        if state.granules != 0 {
            return Ok(());
        }
        let mut len = RESERVE;
        let base = loop {
            match map::reserve(len, GRANULE) {
                Ok(base) => break base,
                Err(error) if len <= RESERVE_MIN => return Err(error),
                Err(_) => len /= 2,
            }
        };
        let granules = len / GRANULE;
        let table = map::table(State::table_bytes(granules))?;
        // SAFETY: new addresses and a new table of the size asked for.
        unsafe { state.open(base, granules, table) };
        let (owners, base) = state.owners();
        self.owners.store(owners.cast_mut(), Ordering::Relaxed);
        self.base.store(base, Ordering::Relaxed);
        self.granules.store(granules, Ordering::Release);
        Ok(())
    }

    /// Names the window that granules are lent from. Once per space, and once
    /// more in a forked child, after [`Space::disown_extents`].
    ///
    /// # Errors
    /// The kernel's, if there is no memory for the pool's table.
    ///
    /// # Safety
    /// `addr..addr + len` is a shared, readable and writable mapping that
    /// stays for ever and that nobody else uses.
    pub unsafe fn open_window(&self, addr: usize, len: usize) -> Result<(), Errno> {
        let granules = len / GRANULE;
        let mut state = self.state.lock();
        if state.window_len != len {
            let each = pool::Pool::table_bytes(granules);
            let table = map::table(each * LOTS)?;
            for (index, pool) in state.pools.iter_mut().enumerate() {
                // SAFETY: a part of a new table, of the size that a pool asks for.
                unsafe { pool.open(table + index * each, granules) };
            }
        }
        if state.dead == 0 {
            state.dead = map::dead(GRANULE)?;
        }
        state.window = addr;
        state.window_len = len;
        Ok(())
    }

    /// Sets what happens when no lent granule is unused: DRAM, or failure.
    pub fn set_dram_when_exhausted(&self, yes: bool) {
        self.dram_when_exhausted.store(yes, Ordering::Relaxed);
    }

    /// Makes every `n`-th new granule of the extent tier DRAM; 0: none.
    pub fn set_interleave(&self, n: u32) {
        self.state.lock().dram_every = n;
    }

    /// Says whether the lender has more to give.
    pub fn set_exhausted(&self, yes: bool) {
        self.refusals.fetch_add(u32::from(yes), Ordering::Relaxed);
        let all = if yes { u32::MAX } else { 0 };
        self.exhausted.store(all, Ordering::Release);
    }

    /// Says whether the lender has more of a lot to give.
    pub(crate) fn set_lot_exhausted(&self, lot: Lot, yes: bool) {
        let bit = 1 << lot.index();
        match yes {
            true => self.exhausted.fetch_or(bit, Ordering::AcqRel),
            false => self.exhausted.fetch_and(!bit, Ordering::AcqRel),
        };
        if yes && lot == Lot::UNTAGGED {
            self.refusals.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether the lender said that it has no more of a lot.
    pub(crate) fn is_lot_exhausted(&self, lot: Lot) -> bool {
        self.exhausted.load(Ordering::Acquire) & 1 << lot.index() != 0
    }

    /// How often the lender has said that it has no more without a tag.
    pub fn refusals(&self) -> u32 {
        self.refusals.load(Ordering::Acquire)
    }

    /// While set, nothing is handed out on extents, but DRAM in their place.
    pub fn set_extents_closed(&self, yes: bool) {
        self.state.lock().extents_closed = yes;
    }

    /// Whether the lender said that it has no more without a tag.
    pub fn is_exhausted(&self) -> bool {
        self.is_lot_exhausted(Lot::UNTAGGED)
    }

    /// Whether an address lies in this space.
    pub fn contains(&self, addr: usize) -> bool {
        let state = self.state.lock();
        state.spans(addr)
    }

    /// Whose pages `addr` lies in, without a lock. `None`: outside the space,
    /// or nothing is there.
    #[inline]
    pub fn owner_of(&self, addr: usize) -> Option<Owner> {
        Owner::from_entry(self.entry_of(addr) & !table::LOST)
    }

    /// Whether `addr` lies in a granule with some backing; without a lock.
    #[inline]
    pub fn has_backing(&self, addr: usize) -> bool {
        self.entry_of(addr) != 0
    }

    /// Whether the content of the granule that `addr` lies in was lost, and
    /// touching it faults; without a lock.
    pub(crate) fn is_lost(&self, addr: usize) -> bool {
        self.entry_of(addr) & table::LOST != 0
    }

    /// The entry of `addr` in the table of owners; 0: nothing is there.
    #[inline]
    fn entry_of(&self, addr: usize) -> u16 {
        let granules = self.granules.load(Ordering::Acquire);
        let index = addr.wrapping_sub(self.base.load(Ordering::Relaxed)) / GRANULE;
        if index >= granules {
            return 0;
        }
        // SAFETY: `open` stored a table of `granules` entries before it stored
        // how many, and it stays.
        let entry = unsafe { &*self.owners.load(Ordering::Relaxed).add(index) };
        entry.load(Ordering::Relaxed)
    }

    /// What backs the granule that `addr` lies in.
    pub fn backing_of(&self, addr: usize) -> Option<Backing> {
        let state = self.state.lock();
        state.index(addr).map(|i| state.granule(i).backing)
    }

    /// What the space holds.
    pub fn usage(&self) -> Usage {
        self.state.lock().usage
    }

    /// A run of `len` bytes, aligned to `align`; both multiples of a page,
    /// `align` a power of two. `dram`: where no lent granule is unused, DRAM
    /// will do, if the heap's policy allows it (an arena has its own). Never waits: `None` if no lent granule is left,
    /// the addresses are used up, or the kernel refused a mapping.
    pub fn alloc(
        &self,
        domain: impl Into<Domain>,
        len: usize,
        align: usize,
        dram: bool,
    ) -> Option<Run> {
        let domain = domain.into();
        let pages = len.checked_next_multiple_of(PAGE)? / PAGE;
        let mut state = self.state.lock();
        if state.granules == 0 || pages == 0 {
            return None;
        }
        if pages < PAGES_PER_GRANULE
            && align <= GRANULE
            && let Some(run) = state.alloc_within(domain, pages, align / PAGE)
        {
            return Some(run);
        }
        let dram_allowed = state.extents_closed
            || dram
                && (domain.owner != Owner::HEAP
                    || self.dram_when_exhausted.load(Ordering::Relaxed));
        let run = state.alloc_across(domain, pages, align / PAGE, dram_allowed);
        if state.short_of() > 0 {
            let _ = self
                .low
                .compare_exchange(FINE, SHORT, Ordering::Relaxed, Ordering::Relaxed);
        }
        run
    }

    /// As [`Space::alloc`], but only inside one granule that is backed already.
    pub fn alloc_in_use(&self, domain: impl Into<Domain>, len: usize, align: usize) -> Option<Run> {
        let pages = len.checked_next_multiple_of(PAGE)? / PAGE;
        if !(1..PAGES_PER_GRANULE).contains(&pages) || align > GRANULE {
            return None;
        }
        self.state
            .lock()
            .alloc_within(domain.into(), pages, align / PAGE)
    }

    /// How many granules the reserved addresses hold.
    pub fn granules(&self) -> usize {
        self.state.lock().granules
    }

    /// Whether the reserved addresses could hold `granules` at all.
    pub fn has_room_for(&self, granules: usize) -> bool {
        granules <= self.state.lock().granules
    }

    /// The run of `len` bytes at exactly `addr`, so that what ends there can
    /// grow in place. `None`: some page of it is in use, or not backed.
    pub fn alloc_at(&self, domain: impl Into<Domain>, addr: usize, len: usize) -> Option<Run> {
        let domain = domain.into();
        let mut state = self.state.lock();
        let pieces = |mut at: usize| {
            core::iter::from_fn(move || {
                let pages = ((addr + len - at) / PAGE).min(PAGES_PER_GRANULE - at % GRANULE / PAGE);
                let piece = (at, at % GRANULE / PAGE, pages);
                at += pages * PAGE;
                (pages > 0).then_some(piece)
            })
        };
        for (at, start, pages) in pieces(addr) {
            let index = state.index(at)?;
            let granule = state.granule(index);
            let usable = granule.domain() == domain
                && granule.backing != Backing::None
                && !granule.in_flight;
            if !usable || state.is_closed(index) || granule.live.intersects(start, pages) {
                return None;
            }
        }
        let mut zeroed = true;
        for (at, start, pages) in pieces(addr) {
            let index = state.index(at)?;
            zeroed &= state.take_pages(index, start, pages);
        }
        Some(Run { addr, zeroed })
    }

    /// Whether unused granules have run short since this was last asked; true
    /// once, until granules are lent.
    pub fn runs_low(&self) -> bool {
        self.low.load(Ordering::Relaxed) == SHORT
            && self
                .low
                .compare_exchange(SHORT, TOLD, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Takes back a run, or any piece of one or several neighbours.
    pub fn free(&self, addr: usize, len: usize) {
        self.state.lock().free_pages(addr, len);
    }

    /// Adds lent granules without a tag, which read as zeroes, to the pool.
    /// Returns the bytes taken; what lies outside the window or is there already
    /// is not.
    pub fn lend(&self, ranges: &Ranges) -> u64 {
        self.lend_to(&mut self.state.lock(), Lot::UNTAGGED, ranges)
    }

    /// The same for granules of a lot.
    fn lend_to(&self, state: &mut State, lot: Lot, ranges: &Ranges) -> u64 {
        let mut taken = 0;
        for range in ranges.as_slice() {
            for step in 0..range.len / GRANULE as u64 {
                let offset = range.offset + step * GRANULE as u64;
                if offset + GRANULE as u64 <= state.window_len as u64
                    && state.pools[lot.index()].put(offset)
                {
                    taken += GRANULE as u64;
                }
            }
        }
        state.lent_at = state.tick;
        state.usage.extent_held += taken;
        state.usage.idle += taken;
        state.usage.note_peaks();
        self.low.store(FINE, Ordering::Relaxed);
        taken
    }

    /// Unused granules that should be asked for, so that the hooks find one.
    pub fn short_of(&self) -> usize {
        self.state.lock().short_of()
    }

    /// Unused granules of a lot above what should be kept.
    pub(crate) fn surplus_of(&self, lot: Lot) -> usize {
        self.state.lock().surplus_of(lot)
    }

    /// Leased granules without a tag that nothing uses, mapped or not.
    pub fn idle_granules(&self) -> usize {
        self.state.lock().idle_of(Lot::UNTAGGED)
    }

    /// Advances the clock by which idle granules age.
    pub fn tick(&self) {
        let mut state = self.state.lock();
        state.tick = state.tick.wrapping_add(1);
    }

    /// Takes up to `granules` unused ones out of the space, to be given back:
    /// of those inside `wanted` (any, if that is empty), idle for at least
    /// `min_age` ticks. At most 28 runs at a time: call again until empty.
    pub fn take_idle(&self, granules: usize, wanted: &[WindowRange], min_age: u32) -> Ranges {
        self.take_idle_of(None, granules, wanted, min_age)
    }

    /// The same, of one lot if that is given.
    pub(crate) fn take_idle_of(
        &self,
        lot: Option<Lot>,
        granules: usize,
        wanted: &[WindowRange],
        min_age: u32,
    ) -> Ranges {
        let mut out = Ranges::EMPTY;
        let mut state = self.state.lock();
        let mut taken = 0;
        for index in (0..state.high).rev() {
            if taken == granules {
                break;
            }
            let granule = *state.granule(index);
            let Backing::Extent(offset) = granule.backing else {
                continue;
            };
            let age = state.tick.wrapping_sub(granule.idle_since);
            let other = lot.is_some_and(|lot| state.lot(granule.owner) != lot);
            if other || !granule.is_idle() || age < min_age || !wants(wanted, offset) {
                continue;
            }
            if out.is_full() || !state.unback_idle(index) {
                break;
            }
            out.push(WindowRange {
                offset,
                len: GRANULE as u64,
            });
            taken += 1;
        }
        if state.tick.wrapping_sub(state.lent_at) >= min_age {
            for (index, pool) in state.pools.iter_mut().enumerate() {
                if lot.is_none_or(|lot| lot.index() == index) {
                    taken += pool.drain(granules - taken, wanted, &mut out);
                }
            }
        }
        state.usage.extent_held -= (taken * GRANULE) as u64;
        state.usage.idle -= (taken * GRANULE) as u64;
        out
    }

    /// Bytes of lent granules, inside `wanted` or anywhere if that is empty,
    /// that nothing uses.
    pub(crate) fn idle_bytes_in(&self, wanted: &[WindowRange]) -> u64 {
        let mut state = self.state.lock();
        let idle = (0..state.high).filter(|&i| {
            let granule = state.granule(i);
            matches!(granule.backing, Backing::Extent(o) if wants(wanted, o)) && granule.is_idle()
        });
        let mapped = idle.count();
        let pools = state.pools.iter_mut().filter(|pool| pool.count() > 0);
        let pooled: usize = pools.map(|pool| pool.count_in(wanted)).sum();
        ((mapped + pooled) * GRANULE) as u64
    }

    /// Bytes of lent granules, inside `wanted` or anywhere if that is empty,
    /// that hold something live; in the latter case also of spilled ones.
    pub fn live_bytes_in(&self, wanted: &[WindowRange]) -> u64 {
        let state = self.state.lock();
        let live = (0..state.high).filter(|&i| {
            let granule = state.granule(i);
            let here = match granule.backing {
                Backing::Extent(offset) => wants(wanted, offset),
                Backing::Spilled => wanted.is_empty(),
                _ => false,
            };
            here && !granule.is_idle()
        });
        (live.count() * GRANULE) as u64
    }

    /// Locks the space for a fork: no other thread is inside it when the
    /// child is made. Ends with [`Space::after_fork`] on both sides.
    pub fn before_fork(&self) {
        core::mem::forget(self.state.lock());
    }

    /// Ends what [`Space::before_fork`] began; once on each side.
    ///
    /// # Safety
    /// The calling thread called `before_fork`, or is its copy in the child.
    pub unsafe fn after_fork(&self) {
        // SAFETY: this thread holds the lock, whose guard it forgot.
        unsafe { self.state.force_unlock() };
    }

    /// In a forked child: leases belong to the parent, so the pool is
    /// emptied, and granules on extents are not this process's any more. No
    /// mapping was inherited there, and none may come to lie there by chance:
    /// what was live is inaccessible from now on.
    ///
    /// What it inherits behind placeholders is of ancestor `line`.
    pub fn disown_extents(&self, line: u8) {
        let mut state = self.state.lock();
        for pool in &mut state.pools {
            while pool.take().is_some() {}
        }
        self.unpin_all(&mut state);
        self.lost.store(0, Ordering::Relaxed);
        let mut index = 0;
        while let Some(run) = state.next_extents(index) {
            index = run.end;
            state.disown(run);
        }
        let inherited = state.inherit_originals(line);
        let usage = &mut state.usage;
        *usage = Usage {
            inherited,
            dram_live: usage.dram_live,
            dram_held: usage.dram_held,
            ..Usage::NEW
        };
        usage.note_peaks();
        self.set_exhausted(true);
    }
}
