//! jemalloc's own names (jemalloc(3)), answering for our heap.
//!
//! A program linked against jemalloc (Debian's redis-server is) gets `malloc`
//! from us and would get `mallctl` from a second, empty heap.

use core::ffi::{c_char, c_int, c_void};
use tikv_jemalloc_sys as je;

/// Where statistics are written: an opaque pointer of the caller's, and text.
type WriteText = Option<unsafe extern "C" fn(*mut c_void, *const c_char)>;

macro_rules! forward {
    ($($(#[doc = $doc:literal])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $ret:ty)?;)*) => {$(
        $(#[doc = $doc])*
        ///
        /// # Safety
        /// As jemalloc(3) says.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) $(-> $ret)? {
            // SAFETY: the caller's promise, passed on.
            unsafe { je::$name($($arg),*) }
        }
    )*};
}

forward! {
    /// Resizes in place, or leaves it.
    fn xallocx(ptr: *mut c_void, size: usize, extra: usize, flags: c_int) -> usize;
    /// The usable size of an allocation.
    fn sallocx(ptr: *const c_void, flags: c_int) -> usize;
    /// Frees.
    fn dallocx(ptr: *mut c_void, flags: c_int);
    /// Frees, the size being known.
    fn sdallocx(ptr: *mut c_void, size: usize, flags: c_int);
    /// The usable size that an allocation would have.
    fn nallocx(size: usize, flags: c_int) -> usize;
    /// Reads, writes or does what a name says.
    fn mallctl(name: *const c_char, old: *mut c_void, old_len: *mut usize, new: *mut c_void, new_len: usize) -> c_int;
    /// Translates a name for [`mallctlbymib`].
    fn mallctlnametomib(name: *const c_char, mib: *mut usize, mib_len: *mut usize) -> c_int;
    /// [`mallctl`] by a translated name.
    fn mallctlbymib(mib: *const usize, mib_len: usize, old: *mut c_void, old_len: *mut usize, new: *mut c_void, new_len: usize) -> c_int;
    /// Writes the engine's statistics.
    fn malloc_stats_print(write: WriteText, opaque: *mut c_void, options: *const c_char);
}

/// An allocation with flags. Those that leave the arena to us go where
/// `malloc` goes.
///
/// # Safety
/// As jemalloc(3) says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mallocx(size: usize, flags: c_int) -> *mut c_void {
    let heap = &dcmalloc::process::HEAP;
    if names_arena(flags) || size < heap.direct_below() {
        // SAFETY: the caller's promise, passed on.
        return unsafe { je::mallocx(size, flags) };
    }
    let zero = flags & je::MALLOCX_ZERO != 0;
    crate::standard::keep_errno(|| heap.allocate(size, align(flags), zero)).cast()
}

/// A change of size with flags; as [`mallocx`].
///
/// # Safety
/// As jemalloc(3) says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rallocx(ptr: *mut c_void, size: usize, flags: c_int) -> *mut c_void {
    let heap = &dcmalloc::process::HEAP;
    let zero = flags & je::MALLOCX_ZERO != 0;
    if names_arena(flags) || zero || size < heap.direct_below() {
        // SAFETY: the caller's promise, passed on.
        return unsafe { je::rallocx(ptr, size, flags) };
    }
    // SAFETY: the caller's promise, passed on.
    let resize = || unsafe { heap.reallocate(ptr.cast(), size, align(flags)) };
    crate::standard::keep_errno(resize).cast()
}

/// The arena is named in the bits from 20 on.
fn names_arena(flags: c_int) -> bool {
    flags >> 20 != 0
}

/// The low six bits are the binary logarithm of the alignment.
fn align(flags: c_int) -> usize {
    1 << (flags & 0x3f)
}
