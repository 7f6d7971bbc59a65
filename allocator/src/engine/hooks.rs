//! jemalloc's extent hooks over a [`Space`]: where its arenas get their pages.
//!
//! They never allocate and never touch `errno`. With `retain:false` jemalloc
//! calls them with none of its locks held, so where nothing is lent a hook
//! may wait a moment for what is on its way; the space's reserve makes that
//! rare.

use core::cell::Cell;
use core::ffi::{c_uint, c_void};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use core::time::Duration;
use std::time::Instant;
use tikv_jemalloc_sys as je;

use super::{Account, ArenaIndex, early, purge};
use crate::placement::OnExhausted;
use crate::space::{Domain, GRANULE, LOTS, Lot, Run, Space, Tier};
use crate::sync::Signal;

/// How long a request of an arena waits for granules that have been asked for
/// (ms), where nothing is said: there is no outer layer that waits for it.
const ON_ITS_WAY_MS: u32 = 200;

thread_local! {
    /// This thread would rather fail than have DRAM in place of an extent.
    static LENT_ONLY: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, in which extents are not replaced by DRAM: what needs a new
/// granule and finds none lent fails.
pub fn lent_only<T>(f: impl FnOnce() -> T) -> T {
    LENT_ONLY.set(true);
    let result = f();
    LENT_ONLY.set(false);
    result
}

/// The hooks of all arenas that take pages of one domain from one space.
#[repr(C)]
pub struct Hooks {
    /// First, so that jemalloc's pointer to it is a pointer to the whole.
    table: je::extent_hooks_t,
    space: &'static Space,
    domain: Domain,
    supply: &'static Supply,
    /// Of an arena of the program: what it may take, and what it has.
    account: Option<&'static Account>,
    users: Users,
}

/// The arenas that have taken pages through one table of hooks; those with
/// large numbers are not remembered.
struct Users([AtomicU64; 4]);

impl Users {
    fn note(&self, ArenaIndex(arena): ArenaIndex) {
        if let Some(word) = self.0.get(arena as usize / 64) {
            word.fetch_or(1 << (arena % 64), Ordering::Relaxed);
        }
    }

    fn each(&self, mut f: impl FnMut(ArenaIndex)) {
        for (i, word) in (0..).zip(&self.0) {
            let mut bits = word.load(Ordering::Relaxed);
            while bits != 0 {
                f(ArenaIndex(i * 64 + bits.trailing_zeros()));
                bits &= bits - 1;
            }
        }
    }
}

/// How a hook calls for more.
pub struct Supply {
    /// Raised when few unused granules are left, or none.
    pub wanted: Signal,
    /// Granules of each lot that a thread waits for.
    pub demand: [AtomicUsize; LOTS],
    /// Raised when some were lent, or the lender has no more.
    pub lent: Signal,
    /// Milliseconds to wait for granules on their way.
    pub patience_ms: AtomicU32,
    /// Wait even when the lender has said that it has no more.
    pub insist: AtomicBool,
    /// A thread waited for too long, and a lot counts as exhausted until the
    /// lender says something, or has nothing to say.
    pub impatient: [AtomicBool; LOTS],
    /// A forked child: it has no lender, and may have one.
    pub orphan: AtomicBool,
    /// Called once when an orphan needs a granule. It may allocate: a hook
    /// that comes of that finds no orphan.
    adopt: fn() -> bool,
}

impl Supply {
    /// A supply that does not wait; what to do for an orphan.
    pub const fn new(adopt: fn() -> bool) -> Self {
        Self {
            wanted: Signal::new(),
            demand: [const { AtomicUsize::new(0) }; LOTS],
            lent: Signal::new(),
            patience_ms: AtomicU32::new(0),
            insist: AtomicBool::new(false),
            impatient: [const { AtomicBool::new(false) }; LOTS],
            orphan: AtomicBool::new(false),
            adopt,
        }
    }
}

impl Supply {
    /// Has an orphan look for a lender.
    fn find_lender(&self) {
        if self.orphan.load(Ordering::Relaxed) && self.orphan.swap(false, Ordering::AcqRel) {
            // A thread being made allocates, and need not have extents for it.
            let lent_only = LENT_ONLY.replace(false);
            let begun = (self.adopt)();
            LENT_ONLY.set(lent_only);
            if !begun {
                self.orphan.store(true, Ordering::Release);
            }
        }
    }

    /// A thread has waited in vain for a lender that has not said that it has
    /// no more of a lot: the next ones do not wait.
    pub fn lose_patience(&self, space: &Space, lot: Lot) {
        if !space.is_lot_exhausted(lot) {
            space.set_lot_exhausted(lot, true);
            self.impatient[lot.index()].store(true, Ordering::Release);
        }
    }

    /// The lender has said something: what it said holds.
    pub fn be_patient(&self, lot: Lot) -> bool {
        self.impatient[lot.index()].swap(false, Ordering::AcqRel)
    }

    /// Calls for granules of a lot that a thread waits for.
    pub fn want(&self, granules: usize, lot: Lot) {
        self.demand[lot.index()].fetch_max(granules, Ordering::AcqRel);
        self.wanted.raise();
    }
}

// SAFETY: a table of functions, and references that may be shared.
unsafe impl Sync for Hooks {}

impl Hooks {
    /// Hooks for one domain of `space`.
    pub const fn new(
        space: &'static Space,
        domain: Domain,
        supply: &'static Supply,
        account: Option<&'static Account>,
    ) -> Self {
        let table = je::extent_hooks_t {
            alloc: Some(alloc),
            dalloc: Some(dalloc),
            destroy: Some(destroy),
            // Pages are usable as long as they are handed out.
            commit: None,
            decommit: None,
            // A DC page can't be purged in place (MADV_DONTNEED on a shared
            // mapping does not zero): purged pages are given back instead.
            purge_lazy: None,
            purge_forced: None,
            split: Some(split),
            merge: Some(merge),
        };
        Self {
            table,
            space,
            domain,
            supply,
            account,
            users: Users([const { AtomicU64::new(0) }; 4]),
        }
    }

    pub(super) fn as_jemalloc(&'static self) -> *const je::extent_hooks_t {
        &raw const self.table
    }

    fn alloc(&self, arena: ArenaIndex, at: usize, size: usize, alignment: usize) -> Option<Run> {
        if let Some(account) = self.account
            && !account.take(size)
        {
            // What it has freed may be all of its limit.
            purge(arena);
            if !account.take(size) {
                account.note_refused();
                return None;
            }
        }
        let run = match (at, self.domain.tier) {
            (0, Tier::Dram) => self.space.alloc(self.domain, size, alignment, true),
            (0, Tier::Extent) => self.alloc_extent(arena, size, alignment),
            (at, _) => self.space.alloc_at(self.domain, at, size),
        };
        if let (None, Some(account)) = (run, self.account) {
            account.put_back(size);
        }
        run
    }

    /// How long to wait for extents (ms), whether also when there are no more,
    /// and whether DRAM will do then.
    fn policy(&self) -> (u32, bool, bool) {
        match self.account.map(Account::on_exhausted) {
            None => {
                let insist = self.supply.insist.load(Ordering::Relaxed);
                (
                    self.supply.patience_ms.load(Ordering::Relaxed),
                    insist,
                    true,
                )
            }
            Some(OnExhausted::Wait(ms)) => (ms, true, false),
            Some(policy) => (ON_ITS_WAY_MS, false, policy == OnExhausted::Dram),
        }
    }

    fn alloc_extent(&self, arena: ArenaIndex, size: usize, alignment: usize) -> Option<Run> {
        if let Some(run) = self.space.alloc_in_use(self.domain, size, alignment) {
            return Some(run);
        }
        // Before more is taken, what the arenas have freed and still keep is
        // let go: jemalloc does not cut small runs from large ones, and each
        // arena keeps its own. A build-up and tear-down of 100 MB in blocks
        // of 64 KiB to 4 MiB leases 119 MB so, and 126 to 138 otherwise.
        match self.account {
            Some(_) => purge(arena),
            None => {
                self.users.note(arena);
                self.users.each(purge);
            }
        }
        let lent = || self.space.alloc(self.domain, size, alignment, false);
        let run = lent();
        if self.space.runs_low() {
            self.supply.wanted.raise();
        }
        if run.is_none() {
            self.supply.find_lender();
        }
        if run.is_some() || LENT_ONLY.get() {
            return run;
        }
        if !self.space.has_room_for(size.div_ceil(GRANULE)) {
            return None;
        }
        let (patience, insist, dram) = self.policy();
        let lot = self.space.lot(self.domain.owner);
        let deadline = Instant::now() + Duration::from_millis(u64::from(patience));
        loop {
            let seen = self.supply.lent.read();
            if let Some(run) = lent() {
                return Some(run);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let vain = self.space.is_lot_exhausted(lot) && !insist;
            if left.is_zero() && patience > 0 {
                self.supply.lose_patience(self.space, lot);
            }
            if left.is_zero() || vain {
                return self.space.alloc(self.domain, size, alignment, dram);
            }
            if !self.space.is_lot_exhausted(lot) {
                self.supply.want(size.div_ceil(GRANULE), lot);
            }
            self.supply.lent.wait(seen, left);
        }
    }

    /// # Safety
    /// jemalloc passed `table` to a hook, so it is one that `as_jemalloc` gave.
    unsafe fn of(table: *mut je::extent_hooks_t) -> &'static Self {
        // SAFETY: the table is the first field of a `Hooks` that lives for ever.
        unsafe { &*table.cast::<Self>() }
    }
}

unsafe extern "C" fn alloc(
    table: *mut je::extent_hooks_t,
    new_addr: *mut c_void,
    size: usize,
    alignment: usize,
    zero: *mut bool,
    commit: *mut bool,
    arena: c_uint,
) -> *mut c_void {
    // SAFETY: called by jemalloc.
    let hooks = unsafe { Hooks::of(table) };
    let Some(run) = hooks.alloc(ArenaIndex(arena), new_addr as usize, size, alignment) else {
        return null_mut();
    };
    // SAFETY: jemalloc's own flag: whether it must have zeroes.
    if unsafe { *zero } && !run.zeroed {
        // SAFETY: a run that was just handed out, and is nobody's yet.
        unsafe { core::ptr::write_bytes(run.addr as *mut u8, 0, size) };
    }
    // SAFETY: jemalloc's own flags. `zero` promises zeroes, so without being
    // asked it is said only of pages that nobody has written since they were
    // lent or mapped.
    unsafe {
        *zero |= run.zeroed;
        *commit = true;
    }
    run.addr as *mut c_void
}

unsafe extern "C" fn dalloc(
    table: *mut je::extent_hooks_t,
    addr: *mut c_void,
    size: usize,
    _committed: bool,
    _arena: c_uint,
) -> bool {
    // SAFETY: called by jemalloc.
    let hooks = unsafe { Hooks::of(table) };
    if hooks.space.contains(addr as usize) {
        hooks.space.free(addr as usize, size);
        if let Some(account) = hooks.account {
            account.put_back(size);
        }
        return false;
    }
    early::note_unmapped(size as u64);
    // SAFETY: from before the hooks were set, so jemalloc mapped it, and it
    // gives it up now.
    unsafe { rustix::mm::munmap(addr, size) }.is_err()
}

unsafe extern "C" fn destroy(
    table: *mut je::extent_hooks_t,
    addr: *mut c_void,
    size: usize,
    _committed: bool,
    _arena: c_uint,
) {
    // SAFETY: called by jemalloc, with the same meaning.
    unsafe { dalloc(table, addr, size, true, 0) };
}

/// Any piece of a run may stand alone: pages are booked one by one.
unsafe extern "C" fn split(
    _table: *mut je::extent_hooks_t,
    _addr: *mut c_void,
    _size: usize,
    _size_a: usize,
    _size_b: usize,
    _committed: bool,
    _arena: c_uint,
) -> bool {
    false
}

/// So may any neighbours go together.
unsafe extern "C" fn merge(
    _table: *mut je::extent_hooks_t,
    _addr_a: *mut c_void,
    _size_a: usize,
    _addr_b: *mut c_void,
    _size_b: usize,
    _committed: bool,
    _arena: c_uint,
) -> bool {
    false
}
