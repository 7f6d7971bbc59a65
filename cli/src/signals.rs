//! Signals as events: nothing is done inside a handler.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;

/// What the user of a terminal, or whoever ends or pokes a process, sends.
const FORWARDED: [libc::c_int; 6] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
];

/// The signals of this process, blocked and readable (signalfd(2)).
pub(crate) struct Signals {
    fd: OwnedFd,
    /// What was blocked before.
    previous: libc::sigset_t,
}

/// One signal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Received {
    /// Which.
    pub(crate) signal: i32,
    /// Sent by a process with kill(2), and so to us alone; the terminal's go
    /// to every process in the foreground.
    pub(crate) by_process: bool,
}

impl Signals {
    /// Blocks the signals for the calling thread and those it starts.
    pub(crate) fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        let mut previous = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: sigemptyset initializes the set, the others get an
        // initialized one; a set of zeroes is a valid one, whether
        // pthread_sigmask fills it in or not; the descriptor is new and ours.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in FORWARDED {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), previous.as_mut_ptr());
            let fd = libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self {
                fd: OwnedFd::from_raw_fd(fd),
                previous: previous.assume_init(),
            })
        }
    }

    /// Has `command` start with the signals blocked that were before.
    pub(crate) fn restore_in(&self, command: &mut Command) {
        let previous = self.previous;
        // SAFETY: pthread_sigmask is async-signal-safe (signal-safety(7)) and
        // reads a set that the closure owns.
        unsafe {
            command.pre_exec(move || {
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const previous, ptr::null_mut());
                Ok(())
            });
        }
    }

    /// The next signal; waits for it.
    pub(crate) fn wait(&self) -> Option<Received> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer has `size` bytes, and zeroes or what the kernel
        // writes are valid integers.
        let info = unsafe {
            let read = libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size);
            if read != size as isize {
                return None;
            }
            info.assume_init()
        };
        Some(Received {
            signal: info.ssi_signo as i32,
            by_process: info.ssi_code <= 0,
        })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
