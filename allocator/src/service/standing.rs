//! Standing still for a fork: everything live on extents is shared or moved,
//! and the worker waits until the child is made.
#![forbid(unsafe_code)]

use core::ops::Range;
use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use super::{RUNNING, STOP, STOPPED, Service, TICK_QUIET};
use crate::config::ForkPolicy;
use crate::heap::Heap;
use crate::sharing::Asides;
use crate::source::ExtentSource;

/// A fork does not wait for longer than this for extents to be emptied: a GiB
/// takes a second at worst.
const FORK_PATIENCE: Duration = Duration::from_secs(60);

/// Who forks by moving its heap often forks again at once: so many ticks. But
/// one that forks every second is not to have its heap in DRAM for ever.
const RESTRAINT: u32 = 4;

impl Service {
    /// Shares or moves what is live on extents and holds the worker, so
    /// that a child made now inherits all of the heap, and no granule in
    /// flight. Until [`Service::resume`] new granules are DRAM.
    pub(crate) fn stop(&self, heap: &Heap) {
        heap.space().set_extents_closed(true);
        if !self.alive.load(Ordering::Acquire) || !self.moves.load(Ordering::Acquire) {
            return;
        }
        self.fork.store(STOP, Ordering::Release);
        heap.wanted().raise();
        let deadline = Instant::now() + FORK_PATIENCE;
        while self.fork.load(Ordering::Acquire) == STOP {
            let seen = self.forking.read();
            let left = deadline.saturating_duration_since(Instant::now());
            if self.fork.load(Ordering::Acquire) != STOP || left.is_zero() {
                break;
            }
            self.forking.wait(seen, left);
        }
    }

    /// Ends what [`Service::stop`] began, in the parent.
    pub(crate) fn resume(&self, heap: &Heap) {
        self.fork.store(RUNNING, Ordering::Release);
        self.forking.raise();
        heap.space().set_extents_closed(false);
    }

    /// The worker's side of [`Service::stop`]: for so many ticks after a fork
    /// nothing comes back to extents. `None`: there was none.
    pub(super) fn stand_still(&self, heap: &Heap, source: &dyn ExtentSource) -> Option<u32> {
        if self.fork.load(Ordering::Acquire) != STOP {
            return None;
        }
        let shared = self.share_or_move(heap, source);
        let _ = self
            .fork
            .compare_exchange(STOP, STOPPED, Ordering::AcqRel, Ordering::Relaxed);
        self.forking.raise();
        while self.fork.load(Ordering::Acquire) == STOPPED {
            let seen = self.forking.read();
            if self.fork.load(Ordering::Acquire) == STOPPED {
                self.forking.wait(seen, TICK_QUIET);
            }
        }
        let restraint = match shared {
            Some(asides) => {
                source.fork_end();
                drop(asides);
                0
            }
            None => RESTRAINT,
        };
        Some(restraint)
    }

    /// Whether placeholders of a fork are mapped as they were made.
    pub(crate) fn is_as_covered(&self, placeholders: Range<usize>) -> bool {
        let evacuator = self.evacuator.lock();
        let evacuator = evacuator.as_ref();
        evacuator.is_some_and(|evacuator| evacuator.is_as_covered(placeholders))
    }

    /// Provides for a child. Something if the source is to hear of the end of
    /// the fork.
    fn share_or_move(&self, heap: &Heap, source: &dyn ExtentSource) -> Option<Asides> {
        let policy = heap.config().fork;
        let mut evacuator = self.evacuator.lock();
        let evacuator = evacuator.as_mut().filter(|_| policy != ForkPolicy::None)?;
        let shared = match policy {
            ForkPolicy::Lazy => self.sharing.share(heap, source, evacuator),
            _ => None,
        };
        evacuator.clear(heap, source);
        shared
    }
}
