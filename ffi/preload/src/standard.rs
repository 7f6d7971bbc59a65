//! malloc(3) and its kin, with glibc's semantics.
//!
//! The fast path is one comparison and the engine; everything else is a named
//! slow path. `errno` is ENOMEM after a failure (posix_memalign returns its
//! error instead), and as it was after anything else.

use allocator::engine;
use allocator::space::PAGE;
use core::ffi::{c_int, c_void};
use core::ptr::null_mut;
use core::sync::atomic::{AtomicUsize, Ordering};
use dcmalloc::process::{HEAP, leave_foreign};

/// No alignment of its own: the engine aligns blocks of 16 bytes and more to 16.
const NATURAL: usize = 1;

/// Runs `f` and puts `errno` back as it was.
pub(crate) fn keep_errno<T>(f: impl FnOnce() -> T) -> T {
    // SAFETY: the address of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    let result = f();
    // SAFETY: as above.
    unsafe { *errno = before };
    result
}

fn set_errno(code: c_int) {
    // SAFETY: the address of this thread's errno.
    unsafe { *libc::__errno_location() = code };
}

/// What a failed allocation returns.
fn or_enomem(ptr: *mut u8) -> *mut c_void {
    if ptr.is_null() {
        set_errno(libc::ENOMEM);
    }
    ptr.cast()
}

#[cold]
fn allocate(size: usize, align: usize, zero: bool) -> *mut c_void {
    or_enomem(keep_errno(|| HEAP.allocate(size, align, zero)))
}

/// Requests of fewer bytes are the engine's alone: [`allocator::Heap::direct_below`],
/// in a place of its own that the fast path reaches with one instruction.
static DIRECT_BELOW: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Takes over what the heap says once it has started.
pub(crate) fn started() {
    DIRECT_BELOW.store(HEAP.direct_below(), Ordering::Relaxed);
}

/// The largest request that jemalloc serves inline, and the smallest threshold
/// that a placement may have: up to here every request is the engine's alone.
const ALWAYS_DIRECT: usize = 4096;

/// malloc(3). Naked: what the compiler makes of the Rust below saves a register
/// and jumps through the global offset table, which costs 1.1 ns of a pair of
/// 6.5 (jemalloc's own library takes 5.4). In a section of its own, which the
/// padding at its end aligns: across the end of a cache line it takes 0.3 ns more.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
#[unsafe(no_mangle)]
#[unsafe(link_section = ".text.malloc")]
pub extern "C" fn malloc(size: usize) -> *mut c_void {
    core::arch::naked_asm!(
        "cmp rdi, {direct}",
        "ja {slow}",
        "jmp {engine}",
        ".p2align 6",
        direct = const ALWAYS_DIRECT - 1,
        slow = sym malloc_slow,
        engine = sym tikv_jemalloc_sys::malloc,
    )
}

/// malloc(3).
#[cfg(not(target_arch = "x86_64"))]
#[unsafe(no_mangle)]
pub extern "C" fn malloc(size: usize) -> *mut c_void {
    if size < ALWAYS_DIRECT {
        return engine::malloc(size).cast();
    }
    malloc_slow(size)
}

extern "C" fn malloc_slow(size: usize) -> *mut c_void {
    if size < DIRECT_BELOW.load(Ordering::Relaxed) {
        return engine::malloc(size).cast();
    }
    allocate(size, NATURAL, false)
}

/// calloc(3).
#[unsafe(no_mangle)]
pub extern "C" fn calloc(count: usize, size: usize) -> *mut c_void {
    let Some(total) = count.checked_mul(size) else {
        return or_enomem(null_mut());
    };
    if total < DIRECT_BELOW.load(Ordering::Relaxed) {
        return engine::calloc(total).cast();
    }
    allocate(total, NATURAL, true)
}

/// realloc(3). A size of 0 frees and returns null, as glibc does. A block of
/// another allocator is left alone: null, and EINVAL.
///
/// # Safety
/// `ptr` is null, or live and from this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(ptr: *mut c_void, size: usize) -> *mut c_void {
    if ptr.is_null() {
        return malloc(size);
    }
    if size == 0 {
        // SAFETY: the caller's promise.
        unsafe { free(ptr) };
        return null_mut();
    }
    if !HEAP.may_own(ptr.addr()) {
        leave_foreign(ptr.addr());
        set_errno(libc::EINVAL);
        return null_mut();
    }
    // SAFETY: the caller's promise.
    or_enomem(keep_errno(|| unsafe {
        HEAP.reallocate(ptr.cast(), size, NATURAL)
    }))
}

/// reallocarray(3).
///
/// # Safety
/// As [`realloc`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reallocarray(ptr: *mut c_void, count: usize, size: usize) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: the caller's promise.
        Some(total) => unsafe { realloc(ptr, total) },
        None => or_enomem(null_mut()),
    }
}

/// What the engine's `free` does not do inline: large blocks, full caches, and
/// pointers of which it knows nothing. In place of the engine's own function
/// for that (see `build.rs`), which takes memory that it does not know for a
/// block of 8 bytes and hands it out again, or reads a null pointer. Memory of
/// another allocator is left alone here, and counted.
///
/// # Safety
/// As [`free`], but that `ptr` may be anything.
unsafe extern "C" fn free_slow(ptr: *mut c_void) {
    if ptr.is_null() {
        return;
    }
    if HEAP.may_own(ptr.addr()) {
        // SAFETY: the caller's promise.
        return unsafe { engine::free_known(ptr.cast()) };
    }
    keep_errno(|| leave_foreign(ptr.addr()));
}

// A name for the linker that the library does not export.
#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".pushsection .text.unlikely.free_slow,\"ax\",@progbits",
    ".globl dcmalloc_free_slow",
    ".hidden dcmalloc_free_slow",
    "dcmalloc_free_slow:",
    "jmp {slow}",
    ".popsection",
    slow = sym free_slow,
);

/// free(3). Naked for the same reason as [`malloc`].
///
/// # Safety
/// `ptr` is null, or live and from this library.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(ptr: *mut c_void) {
    core::arch::naked_asm!("jmp {}", sym tikv_jemalloc_sys::free)
}

/// free(3).
///
/// # Safety
/// `ptr` is null, or live and from this library.
#[cfg(not(target_arch = "x86_64"))]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(ptr: *mut c_void) {
    // SAFETY: the caller's promise.
    unsafe { free_slow(ptr) }
}

/// The obsolete cfree(3).
///
/// # Safety
/// As [`free`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cfree(ptr: *mut c_void) {
    // SAFETY: the caller's promise.
    unsafe { free(ptr) }
}

/// free_sized (C23 7.24.3.4). The size is not needed to find the block.
///
/// # Safety
/// As [`free`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free_sized(ptr: *mut c_void, _size: usize) {
    // SAFETY: the caller's promise.
    unsafe { free(ptr) }
}

/// free_aligned_sized (C23 7.24.3.5).
///
/// # Safety
/// As [`free`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free_aligned_sized(ptr: *mut c_void, _align: usize, _size: usize) {
    // SAFETY: the caller's promise.
    unsafe { free(ptr) }
}

/// memalign(3). An alignment that is no power of two is rounded up to one, as
/// glibc does.
#[unsafe(no_mangle)]
pub extern "C" fn memalign(align: usize, size: usize) -> *mut c_void {
    let Some(align) = align.max(1).checked_next_power_of_two() else {
        set_errno(libc::EINVAL);
        return null_mut();
    };
    allocate(size, align, false)
}

/// aligned_alloc(3): EINVAL unless the alignment is a power of two. The size
/// may be any (C17).
#[unsafe(no_mangle)]
pub extern "C" fn aligned_alloc(align: usize, size: usize) -> *mut c_void {
    if !align.is_power_of_two() {
        set_errno(libc::EINVAL);
        return null_mut();
    }
    allocate(size, align, false)
}

/// posix_memalign(3). Leaves `errno` alone, and `*out` where it fails.
///
/// # Safety
/// `out` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(out: *mut *mut c_void, align: usize, size: usize) -> c_int {
    if !align.is_power_of_two() || align < size_of::<*mut c_void>() {
        return libc::EINVAL;
    }
    let ptr = keep_errno(|| HEAP.allocate(size, align, false));
    if ptr.is_null() {
        return libc::ENOMEM;
    }
    // SAFETY: the caller's promise.
    unsafe { *out = ptr.cast() };
    0
}

/// valloc(3): aligned to a page.
#[unsafe(no_mangle)]
pub extern "C" fn valloc(size: usize) -> *mut c_void {
    allocate(size, PAGE, false)
}

/// pvalloc(3): whole pages.
#[unsafe(no_mangle)]
pub extern "C" fn pvalloc(size: usize) -> *mut c_void {
    match size.max(1).checked_next_multiple_of(PAGE) {
        Some(size) => allocate(size, PAGE, false),
        None => or_enomem(null_mut()),
    }
}

/// malloc_usable_size(3).
///
/// # Safety
/// As [`free`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(ptr: *const c_void) -> usize {
    if !HEAP.may_own(ptr.addr()) {
        return 0;
    }
    // SAFETY: the caller's promise.
    unsafe { engine::usable_size(ptr.cast()) }
}

/// glibc's internal names for the same, which old programs call.
macro_rules! libc_names {
    ($($alias:ident = $name:ident($($arg:ident: $type:ty),*) $(-> $ret:ty)?;)*) => {$(
        #[doc = concat!("[`", stringify!($name), "`] under glibc's internal name.")]
        ///
        /// # Safety
        /// As the function it stands for.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $alias($($arg: $type),*) $(-> $ret)? {
            #[allow(unused_unsafe, reason = "some of the functions are safe")]
            // SAFETY: the caller's promise.
            unsafe { $name($($arg),*) }
        }
    )*};
}

libc_names! {
    __libc_malloc = malloc(size: usize) -> *mut c_void;
    __libc_calloc = calloc(count: usize, size: usize) -> *mut c_void;
    __libc_realloc = realloc(ptr: *mut c_void, size: usize) -> *mut c_void;
    __libc_free = free(ptr: *mut c_void);
    __libc_cfree = cfree(ptr: *mut c_void);
    __libc_memalign = memalign(align: usize, size: usize) -> *mut c_void;
    __libc_valloc = valloc(size: usize) -> *mut c_void;
    __libc_pvalloc = pvalloc(size: usize) -> *mut c_void;
    __posix_memalign = posix_memalign(out: *mut *mut c_void, align: usize, size: usize) -> c_int;
}
