//! The engine: jemalloc does size classes, thread caches and fork locking.
//!
//! This is the one module that names it; nothing else of the project does, so
//! that it can be replaced. Arenas get their memory from a [`Space`](crate::space::Space) through
//! the hooks in `hooks.rs` and keep their metadata in DRAM.

mod account;
mod cache;
mod control;
mod early;
mod hooks;
mod start;

pub use account::Account;
pub use cache::Cache;
pub use control::{
    ArenaIndex, MAX_ARENAS, Statistics, automatic, decay, purge, statistics, take_over, whole_class,
};
pub use early::{early_bytes, is_early};
pub use hooks::{Hooks, Supply, lent_only};
pub use start::prepare;

use core::ffi::{c_int, c_void};
use tikv_jemalloc_sys as je;

/// The largest request: more can't be addressed by a difference of pointers.
pub const MAX_REQUEST: usize = isize::MAX as usize;

/// malloc(3) from the arena that the thread is bound to.
#[inline]
pub fn malloc(size: usize) -> *mut u8 {
    // SAFETY: any size may be asked for.
    unsafe { je::malloc(size) }.cast()
}

/// calloc(3) of one object.
#[inline]
pub fn calloc(size: usize) -> *mut u8 {
    // SAFETY: any size may be asked for.
    unsafe { je::calloc(1, size) }.cast()
}

/// An allocation from a given arena, past the thread's cache.
///
/// `size` may not be 0, `align` is a power of two or 0.
pub fn allocate_from(arena: ArenaIndex, size: usize, align: usize, zero: bool) -> *mut u8 {
    let flags = je::MALLOCX_ARENA(arena.0 as usize) | je::MALLOCX_TCACHE_NONE | flags(align, zero);
    // SAFETY: size is not 0, the arena exists: indices come from `control`.
    unsafe { je::mallocx(size, flags) }.cast()
}

/// An aligned allocation from the arena that the thread is bound to.
///
/// `size` may not be 0, `align` is a power of two.
#[inline]
pub fn allocate(size: usize, align: usize, zero: bool) -> *mut u8 {
    // SAFETY: size is not 0.
    unsafe { je::mallocx(size, flags(align, zero)) }.cast()
}

/// An allocation from a given arena through a cache that holds nothing of
/// another; past all caches without one.
///
/// `size` may not be 0, `align` is a power of two.
#[inline]
pub fn allocate_through(
    cache: Option<Cache>,
    arena: ArenaIndex,
    size: usize,
    align: usize,
    zero: bool,
) -> *mut u8 {
    let flags = je::MALLOCX_ARENA(arena.0 as usize) | Cache::flag(cache) | flags(align, zero);
    // SAFETY: size is not 0, the arena and the cache exist: they come from
    // `control` and `cache`.
    unsafe { je::mallocx(size, flags) }.cast()
}

/// Resizes an allocation; as [`allocate_through`].
///
/// # Safety
/// `ptr` is live and from an arena that the cache serves.
pub unsafe fn reallocate_through(
    cache: Option<Cache>,
    arena: ArenaIndex,
    ptr: *mut u8,
    size: usize,
    align: usize,
) -> *mut u8 {
    let flags = je::MALLOCX_ARENA(arena.0 as usize) | Cache::flag(cache) | flags(align, false);
    // SAFETY: the caller's promise.
    unsafe { je::rallocx(ptr.cast(), size, flags) }.cast()
}

/// Frees an allocation of `size` bytes into a cache; as [`allocate_through`].
///
/// # Safety
/// `ptr` is live, from an arena that the cache serves, and was allocated with
/// this size and alignment.
#[inline]
pub unsafe fn free_through(cache: Option<Cache>, ptr: *mut u8, size: usize, align: usize) {
    // SAFETY: the caller's promise.
    unsafe { je::sdallocx(ptr.cast(), size, Cache::flag(cache) | flags(align, false)) }
}

#[inline]
fn flags(align: usize, zero: bool) -> c_int {
    let align = if align == 0 {
        0
    } else {
        je::MALLOCX_ALIGN(align)
    };
    align | if zero { je::MALLOCX_ZERO } else { 0 }
}

/// Resizes an allocation within the memory that the thread is bound to.
///
/// # Safety
/// `ptr` is live and from this engine; `size` is not 0.
#[inline]
pub unsafe fn reallocate(ptr: *mut u8, size: usize, align: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe { je::rallocx(ptr.cast(), size, flags(align, false)) }.cast()
}

/// Resizes an allocation into a given arena, past the thread's cache.
///
/// # Safety
/// As [`reallocate`].
pub unsafe fn reallocate_into(
    arena: ArenaIndex,
    ptr: *mut u8,
    size: usize,
    align: usize,
) -> *mut u8 {
    let flags = je::MALLOCX_ARENA(arena.0 as usize) | je::MALLOCX_TCACHE_NONE | flags(align, false);
    // SAFETY: the caller's promise.
    unsafe { je::rallocx(ptr.cast(), size, flags) }.cast()
}

/// free(3).
///
/// # Safety
/// `ptr` is null, or live and from this engine.
#[inline]
pub unsafe fn free(ptr: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { je::free(ptr.cast()) }
}

/// free(3) of a block that is known to be the engine's: what its `free` does
/// where it does nothing inline.
///
/// # Safety
/// `ptr` is live and from this engine.
#[inline]
pub unsafe fn free_known(ptr: *mut u8) {
    // SAFETY: the caller's promise.
    unsafe { je::dallocx(ptr.cast(), 0) }
}

/// free(3) with the size known.
///
/// # Safety
/// `ptr` is live and was allocated with this size and alignment.
#[inline]
pub unsafe fn free_sized(ptr: *mut u8, size: usize, align: usize) {
    // SAFETY: the caller's promise.
    unsafe { je::sdallocx(ptr.cast(), size, flags(align, false)) }
}

/// malloc_usable_size(3).
///
/// # Safety
/// `ptr` is null, or live and from this engine.
#[inline]
pub unsafe fn usable_size(ptr: *const u8) -> usize {
    // SAFETY: the caller's promise.
    unsafe { je::malloc_usable_size(ptr.cast::<c_void>()) }
}
