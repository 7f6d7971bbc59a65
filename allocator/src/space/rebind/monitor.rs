//! The monitor: a thread that hears of every wait.
//!
//! mremap(2) of a registered mapping returns only when somebody else has read
//! the event it raises, so the thread that moves granules cannot be the one
//! that reads. The monitor reads, notes who waits, rings a bell, and never
//! does more: it allocates nothing, formats nothing, touches no thread-local
//! variable and no granule, because a granule it touched might be one that
//! only it could have reported.

use super::stall::Stalls;
use super::uffd::{Event, Message, Uffd, read_events};
use super::waiters::Waiters;
use crate::sync::Signal;
use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicI32, Ordering::*};
use core::time::Duration;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{BorrowedFd, IntoRawFd};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

/// Enough for the loop below and a kernel's signal frame.
const STACK: usize = 256 << 10;

/// What the monitor thread and the mover share. It outlives both: a `static`,
/// or memory that is never unmapped, and never on a granule.
pub struct Monitor {
    uffd: AtomicI32,
    bell: AtomicI32,
    pub(super) waiters: Waiters,
    pub(super) stalls: Stalls,
    /// Raised by the thread when it runs.
    awake: Signal,
}

impl Default for Monitor {
    fn default() -> Self {
        Self::new()
    }
}

impl Monitor {
    /// A monitor that does not run yet.
    pub const fn new() -> Self {
        Self {
            uffd: AtomicI32::new(-1),
            bell: AtomicI32::new(-1),
            waiters: Waiters::new(),
            stalls: Stalls::new(),
            awake: Signal::new(),
        }
    }

    /// Starts the thread. It shares the caller's descriptor table and signal
    /// mask.
    pub(super) fn start(&'static self, uffd: &Uffd) -> Result<(), Errno> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        self.uffd.store(uffd.as_raw(), Release);
        self.bell.store(bell.into_raw_fd(), Release);
        self.stalls.clear();
        let asleep = self.awake.read();
        spawn(self)?;
        // On its way there the thread reads the C library's locale, which the
        // program may have on its heap: nothing may move before it is here.
        while self.awake.read() == asleep {
            self.awake.wait(asleep, Duration::from_secs(1));
        }
        Ok(())
    }

    /// Readable when a thread began to wait.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        // SAFETY: `start` stored a descriptor that is never closed, and a
        // mover, which asks for it, exists only after that.
        unsafe { BorrowedFd::borrow_raw(self.bell.load(Acquire)) }
    }

    fn run(&self) {
        self.awake.raise();
        // SAFETY: the mover never closes its userfaultfd.
        let uffd = unsafe { BorrowedFd::borrow_raw(self.uffd.load(Acquire)) };
        let mut messages = [Message::EMPTY; 16];
        loop {
            let heard = match read_events(uffd, &mut messages) {
                Ok(heard) => heard,
                Err(Errno::INTR | Errno::AGAIN) => continue,
                Err(_) => return,
            };
            let mut waits = false;
            for message in &messages[..heard] {
                if let Event::Fault { address, thread } = message.event() {
                    self.waiters.insert(address, thread, now());
                    waits = true;
                }
            }
            if waits {
                // A full counter has rung already.
                let _ = rustix::io::write(self.bell(), &1u64.to_ne_bytes());
            }
        }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

extern "C" fn thread(monitor: *mut c_void) -> *mut c_void {
    // SAFETY: `start` passed a `&'static Monitor`.
    unsafe { &*monitor.cast::<Monitor>() }.run();
    null_mut()
}

/// pthread_create(3), because `std::thread` allocates on both sides.
fn spawn(monitor: &'static Monitor) -> Result<(), Errno> {
    let check = |code: i32| match code {
        0 => Ok(()),
        code => Err(Errno::from_raw_os_error(code)),
    };
    let mut attributes = MaybeUninit::uninit();
    let mut id = MaybeUninit::uninit();
    // SAFETY: `attributes` is initialised before it is used and destroyed
    // after; `monitor` is static and shared by reference only.
    unsafe {
        check(libc::pthread_attr_init(attributes.as_mut_ptr()))?;
        let attributes = attributes.as_mut_ptr();
        libc::pthread_attr_setstacksize(attributes, STACK);
        libc::pthread_attr_setdetachstate(attributes, libc::PTHREAD_CREATE_DETACHED);
        let argument = core::ptr::from_ref(monitor).cast_mut().cast();
        let created = libc::pthread_create(id.as_mut_ptr(), attributes, thread, argument);
        libc::pthread_attr_destroy(attributes);
        check(created)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program hung in its first move: the locale that it had set was in the
    /// granule, and the C library reads the locale to start a thread, which
    /// was the one to report who waits. So it runs before anything moves.
    #[test]
    fn it_runs_before_anything_moves() {
        for _ in 0..20 {
            let Ok(uffd) = Uffd::open(None) else {
                println!("SKIPPED: no userfaultfd");
                return;
            };
            // They are never closed: the thread has no end.
            let uffd = core::mem::ManuallyDrop::new(uffd);
            let monitor: &Monitor = Box::leak(Box::default());
            monitor.start(&uffd).unwrap();
            assert_ne!(monitor.awake.read(), 0);
        }
    }
}
