//! Asking the source for granules, and giving back those that nothing uses.
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use super::{Service, TICK};
use crate::heap::Heap;
use crate::source::{ExtentSource, Ranges, Recall};
use crate::space::{GRANULE, Lot};

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
        let demand = heap.demand(Lot::UNTAGGED).swap(0, Ordering::AcqRel);
        let short = demand.saturating_sub(heap.space().idle_granules());
        let reserve = reserve && !heap.space().is_exhausted();
        let mut ask = short;
        if reserve {
            let displaced = match self.moves.load(Ordering::Relaxed) {
                true => {
                    let displaced = heap.space().displaced(Lot::UNTAGGED);
                    displaced.min(heap.back_per_tick_in(hurry))
                }
                false => 0,
            };
            let idle = heap.space().idle_granules();
            ask += heap.space().short_of().max(displaced.saturating_sub(idle));
        }
        self.order(heap, source, Lot::UNTAGGED, demand, ask);
        if heap.space().has_tags() {
            for lot in Lot::all().skip(1) {
                self.ask_tagged(heap, source, lot, hurry);
            }
        }
    }

    /// The same for capacity with a tag, of which there is no reserve.
    fn ask_tagged(&self, heap: &Heap, source: &dyn ExtentSource, lot: Lot, hurry: bool) {
        let demand = heap.demand(lot).swap(0, Ordering::AcqRel);
        let moves = self.moves.load(Ordering::Relaxed) && !heap.space().is_lot_exhausted(lot);
        let displaced = match moves {
            true => heap
                .space()
                .displaced(lot)
                .min(heap.back_per_tick_in(hurry)),
            false => 0,
        };
        let lacking = demand.max(displaced);
        let ask = lacking.saturating_sub(heap.space().idle_of(lot));
        self.order(heap, source, lot, demand, ask);
    }

    /// Asks the source for `ask` granules of a lot, one request at a time.
    fn order(&self, heap: &Heap, source: &dyn ExtentSource, lot: Lot, demand: usize, ask: usize) {
        if ask == 0 {
            if demand > 0 {
                heap.lent().raise();
            }
        } else if self.asked[lot.index()].swap(true, Ordering::AcqRel) {
            heap.demand(lot).fetch_max(demand, Ordering::AcqRel);
        } else if !source.request((ask * GRANULE) as u64, heap.space().tag_of(lot)) {
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
            self.give_back(heap, source, &all, None, 0);
            self.trim.store(false, Ordering::Release);
            heap.lent().raise();
        }
        asked
    }

    /// Gives back what has been unused for long enough, but for the reserve.
    pub(super) fn give_back_surplus(&self, heap: &Heap, source: &dyn ExtentSource) {
        let min_age = heap.config().return_after_ms / TICK.as_millis() as u32;
        for lot in Lot::with_nobodys() {
            let surplus = Recall {
                bytes: (heap.space().surplus_of(lot) * GRANULE) as u64,
                ..NOTHING
            };
            self.give_back(heap, source, &surplus, Some(lot), min_age);
        }
    }

    /// Gives back what a recall wants of its ranges and is unused, of one lot
    /// if that is given.
    pub(super) fn give_back(
        &self,
        heap: &Heap,
        source: &dyn ExtentSource,
        recall: &Recall,
        lot: Option<Lot>,
        min_age: u32,
    ) -> u64 {
        let mut left = recall.bytes as usize / GRANULE;
        let mut bytes = 0;
        while left > 0 {
            let wanted = recall.ranges.as_slice();
            let ranges = heap.space().take_idle_of(lot, left, wanted, min_age);
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
