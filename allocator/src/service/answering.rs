//! Answering recalls: the chain.
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;
use std::time::Instant;

use super::Service;
use crate::engine;
use crate::evacuation::{Evacuated, Evacuator};
use crate::heap::Heap;
use crate::source::{ExtentSource, Recall, RecallOutcome, Refusal};
use crate::space::GRANULE;

impl Service {
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

    /// The chain: what is unused, what a purge of the engine empties, what can
    /// be moved; the rest is refused.
    pub(super) fn answer(
        &self,
        heap: &Heap,
        source: &dyn ExtentSource,
        recall: &Recall,
        evacuator: &mut Option<Evacuator>,
    ) {
        let until = Instant::now() + recall.deadline;
        let mut idle = self.give_back(heap, source, recall, 0);
        if idle < recall.bytes {
            heap.extent_arenas().for_each(engine::purge);
            let rest = Recall {
                bytes: recall.bytes - idle,
                ..*recall
            };
            idle += self.give_back(heap, source, &rest, 0);
        }
        let mut moved = Evacuated {
            bytes: 0,
            stopped: Some(Refusal::CannotMove),
        };
        if idle < recall.bytes
            && let Some(evacuator) = evacuator
        {
            let rest = Recall {
                bytes: recall.bytes - idle,
                ..*recall
            };
            moved = evacuator.recall(heap, source, &rest, until);
            *self.stalls.lock() = evacuator.stalls();
            // What became unused while others moved.
            let rest = Recall {
                bytes: rest.bytes.saturating_sub(moved.bytes),
                ..rest
            };
            idle += self.give_back(heap, source, &rest, 0);
        }
        let held = heap.space().live_bytes_in(recall.ranges.as_slice());
        let refused = held.min(recall.bytes.saturating_sub(idle + moved.bytes));
        let reason = if refused > 0 {
            moved.stopped.or(Some(Refusal::CannotMove))
        } else {
            None
        };
        let counted = [1, recall.bytes, idle + moved.bytes, refused];
        for (counter, value) in self.recalled.iter().zip(counted) {
            counter.fetch_add(value, Ordering::Relaxed);
        }
        source.answer(
            recall.id,
            &RecallOutcome {
                idle,
                rebound: moved.bytes,
                refused,
                reason,
            },
        );
    }
}
