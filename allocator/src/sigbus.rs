//! SIGBUS: memory of an extent that is broken (`BUS_MCEERR_AR` in
//! sigaction(2)), or was taken by force.
//!
//! Broken memory is lost as what is taken by force is: where its owner has a
//! callback, or `on_lost:zero` holds, it reads as zeroes and the access goes
//! on. Anything else is the program's: one line says what happened, and then
//! its own handler runs, or the default action. A program that installs a
//! handler later than the heap's start replaces ours; it then hears of broken
//! memory first, as it would without us.

use core::cell::UnsafeCell;
use core::ffi::{c_int, c_void};
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use core::time::Duration;
use std::time::Instant;

use crate::heap::Heap;
use crate::sync::Signal;

/// "Hardware memory error consumed on a machine check: action required."
const BUS_MCEERR_AR: c_int = 4;
/// "Detected but not consumed: action optional."
const BUS_MCEERR_AO: c_int = 5;
/// A thread waits for the worker no longer than this.
const PATIENCE: Duration = Duration::from_secs(2);

static HEAP: AtomicPtr<Heap> = AtomicPtr::new(core::ptr::null_mut());
/// Addresses that threads met broken memory at; 0: none.
static BROKEN: [AtomicUsize; 16] = [const { AtomicUsize::new(0) }; 16];
static MENDED: Signal = Signal::new();

struct Before(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written once, before the handler that reads it is installed.
unsafe impl Sync for Before {}

static BEFORE: Before = Before(UnsafeCell::new(MaybeUninit::uninit()));

/// Installs the handler, once in the life of a process.
pub(crate) fn install(heap: &'static Heap) {
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    HEAP.store(core::ptr::from_ref(heap).cast_mut(), Ordering::Release);
    if INSTALLED.swap(true, Ordering::AcqRel) {
        return;
    }
    // SAFETY: a handler that lives for ever; the place for the old action is
    // written by this thread alone, before the handler can read it.
    unsafe {
        let before = (*BEFORE.0.get()).as_mut_ptr();
        if libc::sigaction(libc::SIGBUS, core::ptr::null(), before) != 0 {
            return;
        }
        let mut action: libc::sigaction = core::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        libc::sigemptyset(&mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &action, core::ptr::null_mut());
    }
}

/// Calls `f` with each address at which broken memory was met, and lets the
/// threads go on that wait.
pub(crate) fn each_broken(mut f: impl FnMut(usize)) {
    let mut any = false;
    for place in &BROKEN {
        let addr = place.load(Ordering::Acquire);
        if addr != 0 {
            f(addr);
            place.store(0, Ordering::Release);
            any = true;
        }
    }
    if any {
        MENDED.raise();
    }
}

unsafe extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: this thread's errno.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel passes both, as SA_SIGINFO says.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // SAFETY: null, or a heap that lives for ever.
    let heap = unsafe { HEAP.load(Ordering::Acquire).as_ref() };
    let mended = heap.is_some_and(|heap| match code {
        BUS_MCEERR_AR => mend(heap, addr, PATIENCE),
        // Nobody touched it yet; it is enough that the worker knows.
        BUS_MCEERR_AO => mend(heap, addr, Duration::ZERO),
        _ => false,
    });
    if !mended {
        if heap.is_some_and(|heap| heap.space().owner_of(addr).is_some()) {
            complain(addr, heap.is_some_and(|heap| heap.space().is_lost(addr)));
        }
        // SAFETY: as this handler was called.
        unsafe { pass_on(signal, info, context) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Has the worker put zeroes where memory is broken. `false`: its owner does
/// not want that, or the worker does not come.
fn mend(heap: &Heap, addr: usize, patience: Duration) -> bool {
    let owner = heap.space().owner_of(addr);
    if !owner.is_some_and(|owner| heap.zeroes_lost(owner)) {
        return false;
    }
    let free = |place: &&AtomicUsize| {
        place
            .compare_exchange(0, addr, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    };
    let Some(place) = BROKEN.iter().find(free) else {
        return false;
    };
    heap.wanted().raise();
    let until = Instant::now() + patience;
    loop {
        let seen = MENDED.read();
        if place.load(Ordering::Acquire) != addr {
            return true;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return patience.is_zero();
        }
        MENDED.wait(seen, left);
    }
}

/// One line on stderr, made without allocating.
fn complain(addr: usize, lost: bool) {
    let mut line = [0u8; 128];
    let mut len = 0;
    let mut put = |text: &[u8]| {
        line[len..len + text.len()].copy_from_slice(text);
        len += text.len();
    };
    let digits: [u8; 16] = core::array::from_fn(|i| b"0123456789abcdef"[addr >> (60 - 4 * i) & 15]);
    put(b"dcmalloc: memory at 0x");
    put(&digits);
    let what: &[u8] = match lost {
        true => b" was taken by its device by force; its content is lost\n",
        false => b" is broken, or its file ends before it (SIGBUS)\n",
    };
    put(what);
    let _ = rustix::io::write(rustix::stdio::stderr(), &line[..len]);
}

/// What would have happened without this handler.
///
/// # Safety
/// The arguments are those of a signal handler.
unsafe fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: written before this handler was installed.
    let before = unsafe { (*BEFORE.0.get()).assume_init_ref() };
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The access is tried again and ends the process as the kernel has
            // it, with a core file at the right place.
            // SAFETY: the default action.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: the program installed a function of this type.
            unsafe {
                let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    core::mem::transmute(handler);
                handler(signal, info, context);
            }
        }
        handler => {
            // SAFETY: as above.
            unsafe {
                let handler: extern "C" fn(c_int) = core::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}
