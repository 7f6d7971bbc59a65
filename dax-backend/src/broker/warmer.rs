//! Huge pages ahead of need, on a thread of their own.
//!
//! A client that touches a fresh granule of a memfd takes 512 page faults, and
//! one where the granule is a huge page already. Making it one takes
//! milliseconds, which the broker's loop does not have.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::helper::Helper;
use super::mapping::Mapping;

/// The thread, and the granule it is working on.
#[derive(Debug)]
pub(super) struct Warmer {
    thread: Helper<u64, Warmed>,
    busy: bool,
}

/// What became of a granule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Warmed {
    /// Where it is in the window.
    pub(super) offset: u64,
    /// Whether it is one huge page now.
    pub(super) huge: bool,
}

impl Warmer {
    /// Starts the thread. It ends when the warmer is dropped.
    pub(super) fn start(mapping: Arc<Mapping>) -> io::Result<Self> {
        let thread = Helper::start("dcm-warm", move |orders, results| {
            // Programs come first. Linux takes 0 for the calling thread.
            // SAFETY: changes a priority; failing is harmless.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
            for offset in orders {
                let huge = mapping.collapse(offset);
                if !results.send(Warmed { offset, huge }) {
                    return;
                }
            }
        })?;
        Ok(Self {
            thread,
            busy: false,
        })
    }

    /// Whether it can take an order.
    pub(super) fn is_idle(&self) -> bool {
        !self.busy
    }

    /// Has the granule at `offset` made a huge page.
    pub(super) fn order(&mut self, offset: u64) {
        self.busy = self.thread.order(offset);
    }

    /// What has become of the last order, if it is done.
    pub(super) fn finished(&mut self) -> Option<Warmed> {
        let warmed = self.thread.results().pop()?;
        self.busy = false;
        Some(warmed)
    }
}

impl AsFd for Warmer {
    /// Readable when an order is done.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.thread.as_fd()
    }
}
