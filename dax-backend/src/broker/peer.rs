//! Who is at the other end of a unix socket (`SO_PEERCRED`, unix(7)).

use std::mem;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

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
        let mut cred = libc::ucred {
            pid: 0,
            uid: 0,
            gid: 0,
        };
        let mut len = mem::size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes into `cred`, which is
        // that large and plain old data; the descriptor is borrowed, so open.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut cred).cast(),
                &raw mut len,
            )
        };
        if result != 0 {
            // SAFETY: `__errno_location` is always valid for the calling thread.
            return Err(Errno::from_raw_os_error(unsafe {
                *libc::__errno_location()
            }));
        }
        Ok(Self {
            pid: cred.pid.max(0) as u32,
            uid: cred.uid,
            gid: cred.gid,
        })
    }
}
