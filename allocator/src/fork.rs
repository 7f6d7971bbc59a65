//! What happens around fork(2).
//!
//! fork runs the prepare handlers in the reverse order of their registration
//! (pthread_atfork(3)), and the engine registers its own when it starts. Two
//! pairs of ours go around it:
//!
//! | registered | runs at prepare | does |
//! |---|---|---|
//! | last (`early`) | first | shares the heap or moves it off extents, takes glibc's list of streams |
//! | engine's | second | takes the engine's locks |
//! | first (`late`) | last | takes the space's lock |
//!
//! Extents are shared mappings, which a child would write through into its
//! parent's heap, so no child inherits them. Before a fork everything live on
//! them is put behind placeholders, where whoever touches it gets a copy, or
//! moved to DRAM, where the kernel's copy-on-write does the rest. The child has neither threads nor leases; it gets
//! its own when it first needs an extent (`child_needs_extents`).
//!
//! The list of streams: fork takes it itself, but after the handlers. A thread
//! in fopen or fflush holds it and allocates, so an engine that locked first
//! would wait for ever. Taking it before the engine's locks is the one order
//! that all agree on; the lock counts, so that fork may take it again.

use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use crate::engine;
use crate::heap::Heap;

unsafe extern "C" {
    /// glibc's lock of its list of streams (GLIBC_2.2.5).
    fn _IO_list_lock();
    fn _IO_list_unlock();
    fn _IO_list_resetlock();
}

/// The heap of this process, for handlers that get no argument.
static HEAP: AtomicPtr<Heap> = AtomicPtr::new(core::ptr::null_mut());
static LATE: AtomicBool = AtomicBool::new(false);
static EARLY: AtomicBool = AtomicBool::new(false);

/// Runs before the constructors without a priority, of which the engine has
/// one, so that our first pair is registered before the engine's.
#[used]
#[unsafe(link_section = ".init_array.00101")]
static AT_LOAD: extern "C" fn() = register_late;

/// Registers the pair that must come before the engine's. To be called before
/// the engine's first use; calling it again does nothing.
pub extern "C" fn register_late() {
    if !LATE.swap(true, Ordering::AcqRel) {
        engine::prepare();
        // SAFETY: handlers that live as long as the process.
        unsafe { libc::pthread_atfork(Some(late_prepare), Some(late_parent), Some(late_child)) };
    }
}

/// Registers the pair that must come after the engine's, and names the heap.
pub(crate) fn register_early(heap: &'static Heap) {
    HEAP.store((heap as *const Heap).cast_mut(), Ordering::Release);
    if !EARLY.swap(true, Ordering::AcqRel) {
        // SAFETY: as above.
        unsafe { libc::pthread_atfork(Some(early_prepare), Some(early_parent), Some(early_child)) };
    }
}

fn heap() -> Option<&'static Heap> {
    // SAFETY: null, or a heap that lives as long as the process.
    unsafe { HEAP.load(Ordering::Acquire).as_ref() }
}

/// A hook of the engine has no extent to give in a forked child.
///
/// No lock is held here: jemalloc calls its hooks with none of its own, and
/// what comes back to malloc from a thread being made finds the child provided
/// for. glibc's are its own to take, as in any pthread_create(3).
///
/// `false`: it was not provided for, and may ask again.
pub(crate) fn child_needs_extents() -> bool {
    let Some(heap) = heap() else { return true };
    // SAFETY: the address of this thread's errno.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    let begun = heap.service().begin(heap);
    // SAFETY: as above.
    unsafe { *errno = before };
    begun
}

extern "C" fn early_prepare() {
    if let Some(heap) = heap() {
        heap.before_fork();
    }
    // SAFETY: takes no arguments; released below.
    unsafe { _IO_list_lock() };
}

extern "C" fn early_child() {
    // fork does so itself, but only where the parent had threads.
    // SAFETY: the child has one thread, and nobody is in the list.
    unsafe { _IO_list_resetlock() };
}

extern "C" fn early_parent() {
    // SAFETY: this thread took it in `early_prepare`.
    unsafe { _IO_list_unlock() };
    if let Some(heap) = heap() {
        // SAFETY: this thread ran `early_prepare`.
        unsafe { heap.in_parent() };
    }
}

extern "C" fn late_prepare() {
    if let Some(heap) = heap() {
        heap.space().before_fork();
    }
}

extern "C" fn late_parent() {
    if let Some(heap) = heap() {
        // SAFETY: this thread locked it in `late_prepare`.
        unsafe { heap.space().after_fork() };
    }
}

extern "C" fn late_child() {
    if let Some(heap) = heap() {
        // SAFETY: a copy of the thread that locked it in `late_prepare`.
        unsafe { heap.space().after_fork() };
        heap.in_child();
    }
}
