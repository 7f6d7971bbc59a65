//! SIGBUS: an access to memory that is lost, or that is broken
//! (`BUS_MCEERR_AR` in sigaction(2)).
//!
//! Broken memory is lost as what a device takes by force is: where its owner
//! wants to hear of losses, or `on_lost:zero` holds, it reads as zeroes and the
//! access goes on. Anything else is the program's: one line says what happened,
//! and then its handler runs, or the default action. A program that installs a
//! handler after the heap got extents replaces ours, and hears first.

use core::cell::UnsafeCell;
use core::ffi::{c_int, c_void};
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use rustix::mm::{Advice, madvise};

use crate::heap::Heap;
use crate::space::PAGE;

/// "Hardware memory error consumed on a machine check: action required."
const BUS_MCEERR_AR: c_int = 4;
/// "Detected but not consumed: action optional."
const BUS_MCEERR_AO: c_int = 5;

static HEAP: AtomicPtr<Heap> = AtomicPtr::new(core::ptr::null_mut());

/// What was installed before.
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

unsafe extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: this thread's errno.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel passes both, as SA_SIGINFO says.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // SAFETY: null, or a heap that lives for ever.
    let heap = unsafe { HEAP.load(Ordering::Acquire).as_ref() };
    // A code above 0 is the kernel's: somebody else's signal has no address.
    let heap = heap.filter(|_| code > 0);
    if !heap.is_some_and(|heap| mend(heap, code, addr)) {
        if let Some(heap) = heap {
            complain(heap, code, addr);
        }
        // SAFETY: as this handler was called.
        unsafe { pass_on(signal, info, context) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts zeroes where memory is broken, if its owner wants that. The extent
/// stays lent: nobody else shall have it.
fn mend(heap: &Heap, code: c_int, addr: usize) -> bool {
    let owner = heap.space().owner_of(addr);
    if !owner.is_some_and(|owner| heap.zeroes_lost(owner)) {
        return false;
    }
    match code {
        // The access is not of this heap's threads, none of which has a lock of
        // the space while it touches a granule. It is tried again: one that is
        // on the move it then waits for.
        BUS_MCEERR_AR => match heap.space().extent_at(addr) {
            Some(extent) => {
                heap.lose(&[extent]);
                !heap.space().is_lost(addr)
            }
            // Another thread has mended it, or it is DRAM or a copy of an
            // ancestor's, which nothing mends.
            None => !heap.space().is_lost(addr) && can_be_read(addr),
        },
        // Nobody has touched it yet.
        BUS_MCEERR_AO => true,
        _ => false,
    }
}

/// Whether the page at an address is sound (`MADV_POPULATE_READ`, Linux 5.14).
fn can_be_read(addr: usize) -> bool {
    let page = (addr & !(PAGE - 1)) as *mut c_void;
    // SAFETY: it maps what is missing of a page, and changes nothing in it.
    unsafe { madvise(page, PAGE, Advice::LinuxPopulateRead) }.is_ok()
}

/// One line on stderr, made without allocating, the first time.
fn complain(heap: &Heap, code: c_int, addr: usize) {
    static SAID: AtomicBool = AtomicBool::new(false);
    let what: &[u8] = match code {
        _ if heap.space().is_lost(addr) => {
            b" is lost: its device took it by force, or its spill file was damaged\n"
        }
        BUS_MCEERR_AR | BUS_MCEERR_AO if heap.space().owner_of(addr).is_some() => {
            b" is lost: the machine found it broken\n"
        }
        _ => return,
    };
    if SAID.swap(true, Ordering::Relaxed) {
        return;
    }
    let mut line = [0u8; 128];
    let mut len = 0;
    let digits: [u8; 16] = core::array::from_fn(|i| b"0123456789abcdef"[addr >> (60 - 4 * i) & 15]);
    for text in [b"dcmalloc: memory at 0x".as_slice(), &digits, what] {
        line[len..len + text.len()].copy_from_slice(text);
        len += text.len();
    }
    let _ = rustix::io::write(rustix::stdio::stderr(), &line[..len]);
}

/// What would have happened without this handler.
///
/// # Safety
/// The arguments are those of a signal handler.
unsafe fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: written before this handler was installed.
    let before = unsafe { (*BEFORE.0.get()).assume_init_ref() };
    // SAFETY: the kernel passes it.
    let code = unsafe { (*info).si_code };
    // The access will be tried again.
    let again = code > 0 && code != BUS_MCEERR_AO;
    match before.sa_sigaction {
        libc::SIG_IGN if !again => {}
        // The kernel ignores no fault.
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: the default action; a signal that is sent waits until
            // this handler returns.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                if !again {
                    libc::raise(signal);
                }
            }
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
