//! Arenas: allocation domains of a program, each with its own placement,
//! limit, and callbacks, and with granules that it shares with nobody.
//!
//! ```text
//!  Arena ──┐                    ┌─ thread cache of (this thread, this arena)
//!  clones ─┴─ slot ─ handles ───┼─ engine arena in DRAM, engine arena on extents
//!             (a static table)  └─ hooks ─ granules whose owner is this slot
//! ```
//! What the heap's own threads read of an arena is in the slot, which is
//! static memory; callbacks and names are not, and those threads touch neither.

mod builder;
mod callbacks;
mod slot;
mod threads;

use core::alloc::Layout;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicUsize, Ordering, fence};

use allocator_api2::alloc::{AllocError, Allocator};

use crate::engine;
use crate::heap::Heap;
use slot::Slot;

pub use builder::{ArenaBuilder, ArenaError};
pub(crate) use callbacks::callbacks;
pub use callbacks::{Lost, Pressure};
pub(crate) use slot::table;

/// The longest name of an arena, in bytes.
pub const MAX_NAME: usize = 32;
/// Arenas that a process may have at a time.
pub const MAX_ARENAS: usize = slot::SLOTS;

/// An allocation domain. Clones are the same arena; its memory goes, all of it
/// at once, when the last clone does. A container holds a clone, so nothing
/// that can still be reached loses its memory.
///
/// Made with [`Heap::arena`] or [`DcMalloc::arena`](crate::DcMalloc::arena).
/// Usable wherever `allocator_api2` is: its `Vec` and `Box`, hashbrown's maps.
///
/// Where allocations of an arena go is what its placement says, whatever their
/// alignment: the heap's rule for direct I/O does not hold here, since an arena
/// can [pin](Heap::pin) what a device writes to.
pub struct Arena {
    slot: &'static Slot,
}

/// What an arena holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ArenaStats {
    /// Bytes handed out, with what thread caches keep.
    pub allocated: u64,
    /// Bytes of pages that the arena has; what the limit holds for.
    pub pages: u64,
    /// The limit (bytes).
    pub limit: Option<u64>,
    /// How often the limit refused something.
    pub over_limit: u64,
    /// Bytes of granules whose content was lost and reads as zeroes.
    pub lost: u64,
}

impl Arena {
    /// `size` bytes aligned to `align`, a power of two; null if there is no
    /// memory within the limit. A size of 0 is served as 1.
    #[inline]
    pub fn allocate_bytes(&self, size: usize, align: usize, zero: bool) -> *mut u8 {
        let size = size.max(1);
        let Some(engine) = self.slot.engine(size) else {
            return core::ptr::null_mut();
        };
        let cache = threads::cache(self.slot);
        let ptr = engine::allocate_through(cache, engine, size, align, zero);
        if !ptr.is_null() {
            return ptr;
        }
        self.after_purge(size, || {
            engine::allocate_through(cache, engine, size, align, zero)
        })
    }

    /// Gives an allocation another size, perhaps at another address; null if
    /// there is no memory, and then it is as it was. A size of 0 is served as 1.
    ///
    /// # Safety
    /// `ptr` is live and from this arena, `align` a power of two.
    pub unsafe fn reallocate_bytes(&self, ptr: *mut u8, size: usize, align: usize) -> *mut u8 {
        let size = size.max(1);
        let Some(engine) = self.slot.engine(size) else {
            return core::ptr::null_mut();
        };
        let cache = threads::cache(self.slot);
        // SAFETY: the caller's promise; the cache is this arena's.
        let attempt = || unsafe { engine::reallocate_through(cache, engine, ptr, size, align) };
        let resized = attempt();
        if !resized.is_null() {
            return resized;
        }
        self.after_purge(size, attempt)
    }

    /// Frees an allocation.
    ///
    /// # Safety
    /// `ptr` is live and from this arena, allocated with this size and
    /// alignment.
    #[inline]
    pub unsafe fn free_bytes(&self, ptr: *mut u8, size: usize, align: usize) {
        let cache = threads::cache(self.slot);
        // SAFETY: the caller's promise; the cache is this arena's.
        unsafe { engine::free_through(cache, ptr, size.max(1), align) };
    }

    /// Tries again without what is free and not given back yet: this arena's,
    /// which may be all of its limit, then everybody's.
    #[cold]
    fn after_purge(&self, size: usize, attempt: impl Fn() -> *mut u8) -> *mut u8 {
        if size > engine::MAX_REQUEST {
            return core::ptr::null_mut();
        }
        self.purge();
        let ptr = attempt();
        if !ptr.is_null() || self.slot.account.limit().is_some() {
            return ptr;
        }
        self.heap().purge();
        attempt()
    }

    /// Gives back the pages in which nothing is live, and what this thread's
    /// cache keeps. Other threads keep theirs.
    pub fn purge(&self) {
        threads::flush(self.slot);
        self.slot.engines().for_each(engine::purge);
    }

    /// What it holds. Not for a fast path: it merges counters.
    pub fn stats(&self) -> ArenaStats {
        let account = &self.slot.account;
        ArenaStats {
            allocated: self.slot.engines().map(|engine| engine.allocated()).sum(),
            pages: account.taken(),
            limit: account.limit(),
            over_limit: account.refused(),
            lost: self.slot.lost_bytes(),
        }
    }

    /// Whether some of its content was lost: a device took its memory by
    /// force, and the granules read as zeroes. It stays so.
    pub fn is_lost(&self) -> bool {
        self.slot.lost_bytes() > 0
    }

    /// A number that no other arena of this process has, ever.
    pub fn id(&self) -> u64 {
        self.slot.id()
    }

    /// How many arenas the process has.
    pub fn count() -> usize {
        table().count()
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.slot.name()
    }

    /// Gives up the handle but not the arena, which stays until
    /// [`Arena::from_id`] takes it back: for languages that know it by number.
    pub fn into_id(self) -> u64 {
        core::mem::ManuallyDrop::new(self).id()
    }

    /// The handle that [`Arena::into_id`] gave up. `None`: the arena has ended.
    ///
    /// # Safety
    /// That number was given by `into_id`, and taken back by nobody yet.
    pub unsafe fn from_id(id: u64) -> Option<Self> {
        table().by_id(id).map(|slot| Self { slot })
    }

    /// The heap that it is an arena of.
    pub fn heap(&self) -> &'static Heap {
        self.slot.heap()
    }

    /// Ends the arena and gives it up, if this is the last clone and nothing
    /// is live in it.
    ///
    /// # Errors
    /// Itself, with everything in it as it was. What other threads' caches
    /// keep counts as live as long as those threads use them; in a forked
    /// child, what its parent's other threads' kept does for ever.
    pub fn try_end(self) -> Result<(), Self> {
        if self.slot.handles.load(Ordering::Acquire) > 1 {
            return Err(self);
        }
        threads::flush_all(self.slot);
        match self.stats().allocated {
            0 => Ok(()),
            _ => Err(self),
        }
    }

    /// The arena with that [`Arena::id`], for as long as `f` runs. The caller
    /// knows that no other thread drops the last clone meanwhile.
    pub fn with<T>(id: u64, f: impl FnOnce(&Self) -> T) -> Option<T> {
        let slot = table().by_id(id)?;
        let arena = core::mem::ManuallyDrop::new(Self { slot });
        Some(f(&arena))
    }

    /// The same for the arena that an address lies in.
    pub fn with_owner_of<T>(
        heap: &'static Heap,
        addr: usize,
        f: impl FnOnce(&Self) -> T,
    ) -> Option<T> {
        let slot = table().slot(heap.space().owner_of(addr)?.slot()?);
        let arena = core::mem::ManuallyDrop::new(Self { slot });
        Some(f(&arena))
    }

    fn handles(&self) -> &AtomicUsize {
        &self.slot.handles
    }
}

impl Clone for Arena {
    fn clone(&self) -> Self {
        self.handles().fetch_add(1, Ordering::Relaxed);
        Self { slot: self.slot }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.handles().fetch_sub(1, Ordering::Release) == 1 {
            fence(Ordering::Acquire);
            // SAFETY: no clone is left, so nobody allocates, and what was
            // allocated can't be reached.
            unsafe { table().end(self.slot) };
        }
    }
}

impl core::fmt::Debug for Arena {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Arena")
            .field("name", &self.name())
            .field("id", &self.id())
            .finish()
    }
}

fn sized(ptr: *mut u8, len: usize) -> Result<NonNull<[u8]>, AllocError> {
    let ptr = NonNull::new(ptr).ok_or(AllocError)?;
    Ok(NonNull::slice_from_raw_parts(ptr, len))
}

/// What an allocation of no bytes points to.
fn dangling(layout: Layout) -> *mut u8 {
    core::ptr::without_provenance_mut(layout.align())
}

// SAFETY: memory comes from an engine arena that lives until the last clone
// of this handle is dropped; blocks are disjoint, and clones are the same arena.
unsafe impl Allocator for Arena {
    #[inline]
    fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        match layout.size() {
            0 => sized(dangling(layout), 0),
            size => sized(self.allocate_bytes(size, layout.align(), false), size),
        }
    }

    fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
        match layout.size() {
            0 => sized(dangling(layout), 0),
            size => sized(self.allocate_bytes(size, layout.align(), true), size),
        }
    }

    #[inline]
    unsafe fn deallocate(&self, ptr: NonNull<u8>, layout: Layout) {
        if layout.size() > 0 {
            // SAFETY: the caller allocated it here with this layout.
            unsafe { self.free_bytes(ptr.as_ptr(), layout.size(), layout.align()) };
        }
    }

    unsafe fn grow(
        &self,
        ptr: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> Result<NonNull<[u8]>, AllocError> {
        if old.size() == 0 {
            return self.allocate(new);
        }
        // SAFETY: the caller allocated it here; `new` is larger, so not empty.
        let grown = unsafe { self.reallocate_bytes(ptr.as_ptr(), new.size(), new.align()) };
        sized(grown, new.size())
    }

    unsafe fn grow_zeroed(
        &self,
        ptr: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> Result<NonNull<[u8]>, AllocError> {
        // SAFETY: the caller's promise.
        let grown = unsafe { self.grow(ptr, old, new) }?;
        // SAFETY: from the old size to the new one, all in the new block.
        unsafe {
            let rest = grown.as_ptr().cast::<u8>().add(old.size());
            rest.write_bytes(0, new.size() - old.size());
        }
        Ok(grown)
    }

    unsafe fn shrink(
        &self,
        ptr: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> Result<NonNull<[u8]>, AllocError> {
        if new.size() == 0 {
            // SAFETY: the caller allocated it here with the old layout.
            unsafe { self.deallocate(ptr, old) };
            return sized(dangling(new), 0);
        }
        // SAFETY: the caller allocated it here, and neither size is 0.
        let shrunk = unsafe { self.reallocate_bytes(ptr.as_ptr(), new.size(), new.align()) };
        sized(shrunk, new.size())
    }
}
