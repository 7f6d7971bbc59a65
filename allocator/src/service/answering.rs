//! Answering recalls: the chain.
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;
use std::time::Instant;

use super::Service;
use crate::arena::callbacks;
use crate::heap::Heap;
use crate::source::{ExtentSource, Recall, RecallOutcome, Refusal};

impl Service {
    /// Does what a recall asks as far as it can, and says what came of it; at
    /// the deadline if the work is to go on after it, and at the end.
    pub(super) fn answer(&self, heap: &'static Heap, source: &dyn ExtentSource, recall: &Recall) {
        let until = Instant::now() + recall.deadline;
        let mut done = self.chain(heap, source, recall, Some(until));
        let mut asked = recall.bytes;
        if recall.past_deadline && done.refused.of(Refusal::Deadline) > 0 {
            done.more = true;
            source.answer(recall.id, &done);
            self.count_recall([0, 0, done.returned(), 0]);
            let rest = Recall {
                bytes: recall.bytes - done.returned(),
                ..*recall
            };
            asked = rest.bytes;
            done = self.chain(heap, source, &rest, None);
        }
        debug_assert!(done.refused.bytes() <= asked);
        self.count_recall([1, recall.bytes, done.returned(), done.refused.bytes()]);
        source.answer(recall.id, &done);
    }

    fn count_recall(&self, counted: [u64; 4]) {
        for (counter, value) in self.recalled.iter().zip(counted) {
            counter.fetch_add(value, Ordering::Relaxed);
        }
    }

    /// The chain: what is unused, what a purge of the engine empties, what the
    /// program drops, what can be moved; the rest is refused.
    fn chain(
        &self,
        heap: &'static Heap,
        source: &dyn ExtentSource,
        recall: &Recall,
        until: Option<Instant>,
    ) -> RecallOutcome {
        let mut out = RecallOutcome::default();
        let rest = |out: &RecallOutcome| Recall {
            bytes: recall.bytes.saturating_sub(out.returned()),
            ..*recall
        };
        let give_back = |out: &RecallOutcome| self.give_back(heap, source, &rest(out), None, 0);
        out.idle = give_back(&out);
        if rest(&out).bytes > 0 {
            heap.purge_extents();
            out.purged = give_back(&out);
        }
        if let Some(until) = until
            && rest(&out).bytes > 0
        {
            // The other half of the time is for moving.
            let half = until.saturating_duration_since(Instant::now()) / 2;
            callbacks().press(heap, &rest(&out), half);
            out.dropped = give_back(&out);
        }
        if recall.unused_only {
            return out;
        }
        let mut stopped = Some(Refusal::CannotMove);
        if rest(&out).bytes > 0
            && let Some(evacuator) = self.evacuator.lock().as_mut()
        {
            let before = evacuator.stalls();
            let moved = evacuator.recall(heap, source, &rest(&out), until);
            stopped = moved.stopped;
            out.to_extents = moved.to_extents;
            out.to_dram = moved.to_dram;
            out.spilled = moved.spilled;
            out.copied = moved.copied;
            out.moving = moved.moving;
            let after = evacuator.stalls();
            out.stalls = (&after.since(&before)).into();
            *self.stalls.lock() = (&after).into();
            // What became unused while others moved.
            out.idle += give_back(&out);
        }
        let left = rest(&out).bytes;
        let why = stopped.unwrap_or(Refusal::CannotMove);
        out.refused = heap.space().why_stayed(recall.ranges.as_slice(), left, why);
        out
    }
}
