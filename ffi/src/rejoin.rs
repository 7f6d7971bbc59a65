//! What a source does while its broker is away: it tries to take up again with
//! the one that comes next, on the thread that would hear the broker.

use core::ffi::CStr;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use core::time::Duration;
use std::os::fd::{AsRawFd, RawFd};

use allocator::Tag;
use allocator::source::{Event, Ranges};
use dax_backend::broker::client::ConnectError;
use dax_backend::broker::{BrokerClient, ClientPageMapping};

use crate::leases::Leases;

/// More than a unix socket's address holds.
const PATH: usize = 128;
/// The first pause between two attempts, and the longest.
const SOON: Duration = Duration::from_millis(10);
const SELDOM: Duration = Duration::from_secs(5);

/// States of a connection.
const HERE: u8 = 0;
const AWAY: u8 = 1;
const BACK: u8 = 2;

/// What it takes to find back.
pub(crate) struct Rejoin {
    path: [u8; PATH],
    /// The broker's number for this client.
    client: u64,
    pub(crate) leases: Leases,
    state: AtomicU8,
    attempts: AtomicU32,
}

impl Rejoin {
    pub(crate) fn new(path: &CStr, client: u64, leases: Leases) -> Self {
        let mut copy = [0; PATH];
        let bytes = path.to_bytes_with_nul();
        if let Some(space) = copy.get_mut(..bytes.len()) {
            space.copy_from_slice(bytes);
        }
        Self {
            path: copy,
            client,
            leases,
            state: AtomicU8::new(HERE),
            attempts: AtomicU32::new(0),
        }
    }

    /// Where the broker listens.
    pub(crate) fn path(&self) -> Option<&CStr> {
        CStr::from_bytes_until_nul(&self.path).ok()
    }

    /// Whether the broker can be heard.
    pub(crate) fn is_here(&self) -> bool {
        self.state.load(Ordering::Acquire) == HERE
    }

    /// The connection broke.
    pub(crate) fn lost(&self) -> Event {
        self.attempts.store(0, Ordering::Relaxed);
        self.state.store(AWAY, Ordering::Release);
        Event::Disconnected
    }

    /// The next event of a connection that is not there: after a pause, an
    /// attempt. A new socket takes the place of `old`, whoever sends to it.
    pub(crate) fn next_event(
        &self,
        old: RawFd,
        page: &ClientPageMapping,
        patience: Duration,
    ) -> Event {
        if self.state.load(Ordering::Acquire) == BACK {
            self.state.store(HERE, Ordering::Release);
            return Event::CapacityAvailable;
        }
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let pause = (SOON * (1 << attempt.min(16))).min(SELDOM);
        std::thread::sleep(pause.min(patience));
        let Some(path) = self.path() else {
            return Event::Closed;
        };
        match BrokerClient::rejoin(path, self.client, page, self.leases.runs()) {
            Ok(new) => {
                // SAFETY: both are open in the descriptor table that belongs to
                // the allocator's threads alone.
                let moved = unsafe { libc::dup3(new.fd().as_raw_fd(), old, libc::O_CLOEXEC) };
                if moved < 0 {
                    return Event::Timeout;
                }
                self.state.store(BACK, Ordering::Release);
                // Whatever was asked of the old broker is not answered any more.
                Event::Granted {
                    ranges: Ranges::EMPTY,
                    tag: Tag::NONE,
                    exhausted: false,
                    last: true,
                }
            }
            // It knows us not, and never will.
            Err(ConnectError::Refused { .. }) => Event::Closed,
            Err(_) => Event::Timeout,
        }
    }
}
