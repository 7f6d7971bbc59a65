//! Who is at the other end of a unix socket (`SO_PEERCRED`, unix(7)).

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Credentials of the process that connected or listened, as the kernel took them then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process id; 0 when the peer lives in a pid namespace that we cannot see.
    pub pid: u32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
}

impl Peer {
    /// The peer of `socket`.
    ///
    /// Not rustix' `socket_peercred`: its pid is a non-zero type, and the
    /// kernel reports 0 across pid namespaces.
    pub fn of(socket: impl AsFd) -> Result<Self, Errno> {
        // SAFETY: a ucred is three integers.
        let cred: libc::ucred = unsafe { socket_option(socket.as_fd(), libc::SO_PEERCRED) }?;
        Ok(Self {
            pid: cred.pid.max(0) as u32,
            uid: cred.uid,
            gid: cred.gid,
        })
    }
}

/// Whether process `pid` is dead, also if nobody has waited for it yet. One that
/// can't be seen (0) is, as far as anybody can tell.
pub(super) fn is_gone(pid: u32) -> bool {
    let Some(pid) = Pid::from_raw(pid.cast_signed()) else {
        return true;
    };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(errno) => return errno == Errno::SRCH,
    };
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// A descriptor of the process at the other end, readable when it is dead
/// (`SO_PEERPIDFD`, Linux 6.5): unlike its pid it can't come to mean another
/// process. `None` where the kernel has none.
pub(super) fn peer_pidfd(socket: impl AsFd) -> Option<OwnedFd> {
    /// asm-generic/socket.h; the libc crate has it for few targets.
    const SO_PEERPIDFD: c_int = 77;
    // SAFETY: the option's value is a descriptor, an integer.
    let fd: c_int = unsafe { socket_option(socket.as_fd(), SO_PEERPIDFD) }.ok()?;
    // SAFETY: the kernel has just made this descriptor for us, nobody else owns it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reads a `SOL_SOCKET` option.
///
/// # Safety
/// Every bit pattern is a valid `T`.
unsafe fn socket_option<T: Copy>(socket: BorrowedFd<'_>, option: c_int) -> Result<T, Errno> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, which has as
    // many; the descriptor is borrowed, so open.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        // SAFETY: `__errno_location` is valid for the calling thread.
        let errno = unsafe { *libc::__errno_location() };
        return Err(Errno::from_raw_os_error(errno));
    }
    // SAFETY: zeroed or written by the kernel, and by contract any bits will do.
    Ok(unsafe { value.assume_init() })
}
