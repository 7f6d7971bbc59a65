//! Asking the source for granules, and giving back those that nothing uses.
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use super::{Service, TICK};
use crate::heap::Heap;
use crate::source::{ExtentSource, Ranges, Recall};
use crate::space::GRANULE;

/// malloc_trim waits no longer than this.
const TRIM_PATIENCE: Duration = Duration::from_secs(1);
/// A recall of the heap's own: of nothing in particular.
const NOTHING: Recall = Recall {
    id: 0,
    bytes: 0,
    deadline: TICK,
    ranges: Ranges::EMPTY,
    past_deadline: false,
    unused_only: false,
};

impl Service {
    /// Asks for what waiting threads lack and, if `reserve`, for what the
    /// reserve lacks; with `hurry`, for all that is in DRAM for want of extents.
    pub(super) fn ask(&self, heap: &Heap, source: &dyn ExtentSource, reserve: bool, hurry: bool) {
        let demand = heap.demand().swap(0, Ordering::AcqRel);
        let short = demand.saturating_sub(heap.space().idle_granules());
        let reserve = reserve && !heap.space().is_exhausted();
        let mut ask = short;
        if reserve {
            let displaced = match self.moves.load(Ordering::Relaxed) {
                true => heap.space().displaced().min(heap.back_per_tick_in(hurry)),
                false => 0,
            };
            let idle = heap.space().idle_granules();
            ask += heap.space().short_of().max(displaced.saturating_sub(idle));
        }
        if ask == 0 {
            if demand > 0 {
                heap.lent().raise();
            }
        } else if self.asked.swap(true, Ordering::AcqRel) {
            heap.demand().fetch_max(demand, Ordering::AcqRel);
        } else if !source.request((ask * GRANULE) as u64) {
            self.closed(heap);
        }
    }

    /// Gives back all that is unused, the reserve included, and returns when
    /// that is done.
    pub(crate) fn trim(&self, heap: &Heap) {
        if !self.is_running() {
            return;
        }
        self.trim.store(true, Ordering::Release);
        let deadline = Instant::now() + TRIM_PATIENCE;
        while self.trim.load(Ordering::Acquire) {
            let seen = heap.lent().read();
            heap.wanted().raise();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if self.trim.load(Ordering::Acquire) {
                heap.lent().wait(seen, left);
            }
        }
    }

    /// The worker's side of [`Service::trim`].
    pub(super) fn trimmed(&self, heap: &Heap, source: &dyn ExtentSource) -> bool {
        let asked = self.trim.load(Ordering::Acquire);
        if asked && self.is_running() {
            let all = Recall {
                bytes: heap.space().usage().idle,
                ..NOTHING
            };
            self.give_back(heap, source, &all, 0);
            self.trim.store(false, Ordering::Release);
            heap.lent().raise();
        }
        asked
    }

    /// Gives back what has been unused for long enough, but for the reserve.
    pub(super) fn give_back_surplus(&self, heap: &Heap, source: &dyn ExtentSource) {
        let surplus = Recall {
            bytes: (heap.space().surplus() * GRANULE) as u64,
            ..NOTHING
        };
        let min_age = heap.config().return_after_ms / TICK.as_millis() as u32;
        self.give_back(heap, source, &surplus, min_age);
    }

    /// Gives back up to `granules` unused ones of a recall's ranges.
    pub(super) fn give_back(
        &self,
        heap: &Heap,
        source: &dyn ExtentSource,
        recall: &Recall,
        min_age: u32,
    ) -> u64 {
        let mut left = recall.bytes as usize / GRANULE;
        let mut bytes = 0;
        while left > 0 {
            let ranges = heap
                .space()
                .take_idle(left, recall.ranges.as_slice(), min_age);
            if ranges.is_empty() {
                break;
            }
            source.give_back(&ranges);
            left -= (ranges.bytes() as usize / GRANULE).min(left);
            bytes += ranges.bytes();
        }
        self.returned.fetch_add(bytes, Ordering::Relaxed);
        bytes
    }
}
