//! Ending a broker from another thread.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// Ends [`Broker::serve`](super::Broker::serve) from another thread.
#[derive(Debug, Clone)]
pub struct Stop {
    event: Arc<OwnedFd>,
    state: Arc<AtomicU8>,
}

const RUN: u8 = 0;
const WHEN_IDLE: u8 = 1;
const NOW: u8 = 2;

impl Stop {
    /// Not stopped yet.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn new() -> Result<Self, Errno> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            event: Arc::new(event),
            state: Arc::new(AtomicU8::new(RUN)),
        })
    }

    /// Stop at once. Clients keep what they have mapped, and can't get more.
    pub fn now(&self) {
        self.raise(NOW);
    }

    /// Stop as soon as no client is left.
    pub fn when_idle(&self) {
        self.raise(WHEN_IDLE);
    }

    fn raise(&self, state: u8) {
        self.state.fetch_max(state, Ordering::SeqCst);
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Whether to end now, given that no client is left or that one is.
    pub(super) fn reached(&self, idle: bool) -> bool {
        // Read the event, so that poll waits again while clients remain.
        let _ = rustix::io::read(&self.event, &mut [0u8; 8]);
        match self.state.load(Ordering::SeqCst) {
            RUN => false,
            WHEN_IDLE => idle,
            _ => true,
        }
    }
}

impl AsFd for Stop {
    /// Readable when something was said.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
