//! Threads of the heap's own, started without std: detached, and with all
//! signals of the program blocked.

use core::ffi::c_void;
use core::ptr::null_mut;
use rustix::io::Errno;

/// What a thread runs.
pub(crate) type Main = extern "C" fn(*mut c_void) -> *mut c_void;

/// Starts a thread with a stack of `stack` bytes. `pthread_create` allocates,
/// so this is never called inside `malloc`.
pub(crate) fn spawn(main: Main, argument: *mut c_void, stack: usize) -> Result<(), Errno> {
    // SAFETY: plain libc calls on values that live here; what the argument
    // needs is between the caller and `main`.
    let code = unsafe {
        let mut attr = core::mem::zeroed();
        libc::pthread_attr_init(&mut attr);
        libc::pthread_attr_setstacksize(&mut attr, stack);
        libc::pthread_attr_setdetachstate(&mut attr, libc::PTHREAD_CREATE_DETACHED);
        let (mut all, mut before) = (core::mem::zeroed(), core::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let mut thread = 0;
        let code = libc::pthread_create(&mut thread, &attr, main, argument);
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, null_mut());
        libc::pthread_attr_destroy(&mut attr);
        code
    };
    if code == 0 {
        Ok(())
    } else {
        Err(Errno::from_raw_os_error(code))
    }
}

/// Lets the calling thread's own faults be handled as the program wants it:
/// it runs code of the program.
pub(crate) fn hear_faults() {
    // SAFETY: a set that lives here.
    unsafe {
        let mut faults = core::mem::zeroed();
        libc::sigemptyset(&mut faults);
        for signal in [libc::SIGBUS, libc::SIGSEGV, libc::SIGFPE, libc::SIGILL] {
            libc::sigaddset(&mut faults, signal);
        }
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &faults, null_mut());
    }
}
