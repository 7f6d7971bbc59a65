//! What is said to jemalloc besides allocating: arenas, threads, purging,
//! statistics (mallctl in jemalloc(3)). None of it allocates in a thread that
//! has allocated before.

use core::ffi::{CStr, c_uint, c_void};
use core::ptr::null_mut;
use tikv_jemalloc_sys as je;

use super::Hooks;
use super::early;

/// One of jemalloc's arenas.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArenaIndex(pub(super) c_uint);

impl ArenaIndex {
    /// The index as jemalloc counts.
    pub fn get(self) -> u32 {
        self.0
    }

    /// Makes an arena that takes its pages through `hooks` and keeps its
    /// metadata in DRAM. `None`: jemalloc is out of memory or of arenas.
    pub fn create(hooks: &'static Hooks, decay_ms: isize) -> Option<Self> {
        #[repr(C)]
        struct Config {
            hooks: *const je::extent_hooks_t,
            metadata_use_hooks: bool,
        }
        let config = Config {
            hooks: hooks.as_jemalloc(),
            metadata_use_hooks: false,
        };
        let mut index: c_uint = 0;
        exchange(
            c"experimental.arenas_create_ext",
            Some(&mut index),
            Some(config),
        )?;
        let arena = Self(index);
        arena.write(c"arena.0.dirty_decay_ms", decay_ms)?;
        arena.write(c"arena.0.muzzy_decay_ms", 0isize)?;
        Some(arena)
    }

    /// Ends an arena and everything that was allocated from it. No cache holds
    /// anything of it.
    pub(crate) fn destroy(self) {
        self.control(c"arena.0.destroy", null_mut(), 0);
    }

    /// Bytes handed out, what caches hold included.
    pub(crate) fn allocated(self) -> u64 {
        exchange(c"epoch", None::<&mut u64>, Some(1u64));
        let read = |name| self.read_statistic(name).unwrap_or(0);
        read(c"stats.arenas.0.small.allocated") + read(c"stats.arenas.0.large.allocated")
    }

    /// Reads a `size_t` of `stats.arenas.<index>.…`, given as `stats.arenas.0.…`.
    fn read_statistic(self, name: &CStr) -> Option<u64> {
        let (mut value, mut len) = (0usize, size_of::<usize>());
        let (mib, depth) = self.mib(name, 2)?;
        let old: *mut usize = &mut value;
        // SAFETY: the mib is one that jemalloc just made; `old` has `len` bytes.
        let code =
            unsafe { je::mallctlbymib(mib.as_ptr(), depth, old.cast(), &mut len, null_mut(), 0) };
        (code == 0).then_some(value as u64)
    }

    /// For a table of arenas in which 0 means none.
    pub(crate) fn to_slot(self) -> u32 {
        self.0 + 1
    }

    /// The inverse of [`ArenaIndex::to_slot`].
    pub(crate) fn from_slot(slot: u32) -> Option<Self> {
        slot.checked_sub(1).map(Self)
    }

    fn write<T>(self, name: &CStr, value: T) -> Option<()> {
        let mut value = value;
        self.control(name, (&raw mut value).cast(), size_of::<T>())
    }

    /// Calls `arena.<index>.…`, given as `arena.0.…`.
    fn control(self, name: &CStr, new: *mut c_void, len: usize) -> Option<()> {
        let (mib, depth) = self.mib(name, 1)?;
        // SAFETY: the mib is one that jemalloc just made; `new` has `len` bytes.
        let code =
            unsafe { je::mallctlbymib(mib.as_ptr(), depth, null_mut(), null_mut(), new, len) };
        (code == 0).then_some(())
    }

    /// A name with one of its components replaced by this index.
    fn mib(self, name: &CStr, component: usize) -> Option<([usize; 6], usize)> {
        let mut mib = [0usize; 6];
        let mut depth = mib.len();
        // SAFETY: a nul-terminated name and a mib of the length said.
        let found = unsafe { je::mallctlnametomib(name.as_ptr(), mib.as_mut_ptr(), &mut depth) };
        if found != 0 {
            return None;
        }
        mib[component] = self.0 as usize;
        Some((mib, depth))
    }
}

/// mallctl: reads into `old`, then writes `new`, where given.
pub(super) fn exchange<A, B>(name: &CStr, old: Option<&mut A>, new: Option<B>) -> Option<()> {
    let mut old_len = size_of::<A>();
    let (old, old_len): (*mut c_void, *mut usize) = match old {
        Some(old) => ((old as *mut A).cast(), &mut old_len),
        None => (null_mut(), null_mut()),
    };
    let mut new = new;
    let (new, new_len) = match &mut new {
        Some(new) => ((new as *mut B).cast(), size_of::<B>()),
        None => (null_mut(), 0),
    };
    // SAFETY: a nul-terminated name, and each pointer goes with its size.
    let code = unsafe { je::mallctl(name.as_ptr(), old.cast(), old_len, new, new_len) };
    (code == 0).then_some(())
}

/// Arenas there are at most; jemalloc makes four per processor, but each
/// keeps its own part-filled pages, and on extents those are capacity.
pub const MAX_ARENAS: usize = 32;

/// The arenas between which jemalloc shares out the threads.
pub fn automatic() -> impl Iterator<Item = ArenaIndex> {
    let mut count: c_uint = 0;
    exchange::<_, ()>(c"opt.narenas", Some(&mut count), None);
    (0..count).map(ArenaIndex)
}

/// Makes the automatic arenas take their pages through `hooks`. They are made
/// first, as jemalloc makes them, so that their metadata stays in DRAM.
pub fn take_over(hooks: &'static Hooks, decay_ms: isize) {
    early::note(statistics().active);
    for arena in automatic() {
        let probe = super::allocate_from(arena, 1, 0, false);
        if !probe.is_null() {
            early::note_place(probe.addr());
        }
        // SAFETY: just allocated, or null.
        unsafe { super::free(probe) };
        arena.write(c"arena.0.extent_hooks", hooks.as_jemalloc());
        arena.write(c"arena.0.dirty_decay_ms", decay_ms);
    }
}

/// The smallest size from which all sizes are served by classes that hold
/// nothing below `size`, so that no thread cache mixes the two.
pub fn whole_class(size: usize) -> usize {
    if size == usize::MAX {
        return size;
    }
    // SAFETY: not 0; jemalloc computes, and allocates nothing.
    unsafe { je::nallocx(size - 1, 0) + 1 }
}

/// Gives back the unused pages whose time has come.
pub fn decay(arena: ArenaIndex) {
    arena.control(c"arena.0.decay", null_mut(), 0);
}

/// Gives back all unused pages.
pub fn purge(arena: ArenaIndex) {
    arena.control(c"arena.0.purge", null_mut(), 0);
}

/// Bytes that jemalloc has from anywhere.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Handed out to the program.
    pub allocated: u64,
    /// In pages that hold something handed out; all arenas.
    pub active: u64,
    /// In its own structures, in DRAM.
    pub metadata: u64,
}

/// Reads jemalloc's counters (a merge over all arenas: not for a fast path).
pub fn statistics() -> Statistics {
    exchange(c"epoch", None::<&mut u64>, Some(1u64));
    let read = |name| {
        let mut value = 0usize;
        exchange::<_, ()>(name, Some(&mut value), None);
        value as u64
    };
    Statistics {
        allocated: read(c"stats.allocated"),
        active: read(c"stats.active"),
        metadata: read(c"stats.metadata"),
    }
}
