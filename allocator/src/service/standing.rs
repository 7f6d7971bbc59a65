//! Standing still for a fork: everything live on extents is shared or moved,
//! and the worker waits until the child is made.
#![forbid(unsafe_code)]

use core::ops::Range;
use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use super::{RUNNING, STOP, STOPPED, Service, TICK_QUIET};
use crate::arena::callbacks;
use crate::config::ForkPolicy;
use crate::heap::Heap;
use crate::sharing::Asides;
use crate::source::ExtentSource;

/// A fork waits for extents to be emptied for as long as some are, but not for
/// longer than this while nothing moves.
const FORK_PATIENCE: Duration = Duration::from_secs(60);

/// Who forks by moving its heap often forks again at once. What was moved stays
/// in DRAM for so many times as long as that took, so that a program that forks
/// all the time waits for no more than a ninth of it.
const REST: u32 = 8;
/// The same, at most: of a large heap only so much comes back in a tick.
const LONGEST_REST: Duration = Duration::from_millis(200);

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
        // Whatever it waits for.
        heap.lent().raise();
        callbacks().fork_waits();
        let mut moved = heap.moved();
        let mut deadline = Instant::now() + FORK_PATIENCE;
        while self.is_to_stop() {
            let seen = self.forking.read();
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.is_to_stop() {
                break;
            }
            if left.is_zero() {
                if heap.moved() == moved {
                    break;
                }
                moved = heap.moved();
                deadline = Instant::now() + FORK_PATIENCE;
            } else {
                self.forking.wait(seen, left);
            }
        }
    }

    /// A fork waits for the worker: what it is at ends soon, and nothing new
    /// begins.
    pub(crate) fn is_to_stop(&self) -> bool {
        self.fork.load(Ordering::Acquire) == STOP
    }

    /// Ends what [`Service::stop`] began, in the parent.
    pub(crate) fn resume(&self, heap: &Heap) {
        self.fork.store(RUNNING, Ordering::Release);
        self.forking.raise();
        heap.space().set_extents_closed(false);
    }

    /// The worker's side of [`Service::stop`]: for so long after a fork nothing
    /// comes back to extents. `None`: there was none, or nothing was moved.
    pub(super) fn stand_still(&self, heap: &Heap, source: &dyn ExtentSource) -> Option<Duration> {
        if !self.is_to_stop() {
            return None;
        }
        let begun = Instant::now();
        let shared = self.share_or_move(heap, source);
        let took = begun.elapsed();
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
        let Some(asides) = shared else {
            return Some((took * REST).min(LONGEST_REST));
        };
        source.fork_end();
        drop(asides);
        None
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
