//! Clients in processes of their own: forked, so that they may be killed.
//!
//! Between fork and exit a child does only what allocates nothing, which the
//! client's end of the protocol promises anyway.

use std::ffi::CStr;
use std::io::{Read, pipe};
use std::os::fd::AsRawFd;

use dax_backend::broker::{BrokerClient, FromBroker, GRANULE, Welcome};

use crate::rig::{PATIENCE, map_window, scribble};

/// Seconds after which a child that a failed test forgot ends itself.
pub(crate) const LIFETIME: u32 = 60;

/// A forked child; killed and reaped when dropped.
pub(crate) struct Forked {
    pub(crate) pid: i32,
    output: std::io::PipeReader,
}

impl Forked {
    /// Runs `body` in a child. Its answer, one byte, is read by [`Self::answer`];
    /// the child then sleeps until it is killed.
    pub(crate) fn run(body: impl FnOnce() -> u8) -> Self {
        let (output, input) = pipe().unwrap();
        // SAFETY: the child calls nothing but `body`, which allocates nothing
        // and takes no lock, then write, pause and _exit.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            let answer = [body()];
            // SAFETY: as above.
            unsafe {
                libc::alarm(LIFETIME);
                libc::write(input.as_raw_fd(), answer.as_ptr().cast(), 1);
                loop {
                    libc::pause();
                }
            }
        }
        Self { pid, output }
    }

    pub(crate) fn answer(&mut self) -> u8 {
        let mut byte = [0];
        self.output.read_exact(&mut byte).unwrap();
        byte[0]
    }

    pub(crate) fn kill(&self) {
        // SAFETY: a child of ours that is not reaped yet.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
    }
}

impl Drop for Forked {
    fn drop(&mut self) {
        self.kill();
        // SAFETY: as in `kill`.
        unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) };
    }
}

/// Leases `granules`, writes all over them and keeps everything; `None` if
/// anything went wrong.
pub(crate) fn lease_and_scribble(socket: &CStr, granules: u64) -> Option<(BrokerClient, Welcome)> {
    let (broker, welcome) = BrokerClient::connect(socket, 0).ok()?;
    let memory = map_window(&welcome).ok()?;
    broker.request_lease(granules * GRANULE).ok()?;
    let mut granted = 0;
    loop {
        match broker.recv(Some(PATIENCE)).ok()?? {
            FromBroker::Grant { ranges, last, .. } => {
                scribble(memory, ranges.as_slice());
                granted += ranges.bytes();
                if last {
                    break;
                }
            }
            _ => return None,
        }
    }
    (granted == granules * GRANULE).then_some((broker, welcome))
}
