//! What is marked and free goes to the device.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::protocol::WindowRange;
use super::recall::ActiveRecall;
use super::receipt::DpaSpan;
use super::server::Broker;
use crate::address::DpaRange;

/// After so long the device is offered once more what it asked for and did not take.
const AGAIN: Duration = Duration::from_secs(1);

/// What the device is taking back at the moment.
#[derive(Debug)]
pub(super) struct Leaving {
    /// Each part, and the granules in it.
    parts: Vec<(DpaRange, Vec<WindowRange>)>,
    /// Nobody had been asked: it was free anyway.
    unasked: bool,
    /// The recall that claimed some of it, and the bytes.
    claim: Option<(u64, u64)>,
    /// Taken by force since the order was given.
    taken: Vec<DpaRange>,
}

/// What the device did not take, and when it gets it again: not at once, because what it refuses
/// now it is likely to refuse then.
#[derive(Debug, Default)]
pub(super) struct Untaken {
    ranges: Vec<DpaRange>,
    again: Option<Instant>,
}

impl Untaken {
    fn is_due(&self, now: Instant) -> bool {
        self.again.is_some_and(|again| again <= now)
    }

    fn has(&self, range: &DpaRange) -> bool {
        self.ranges.iter().any(|untaken| untaken.intersects(range))
    }
}

impl Broker {
    /// Gives the device what is marked and free. It takes one order at a time:
    /// what becomes free meanwhile goes with the next.
    pub(super) fn hand_over(&mut self, recall: Option<&ActiveRecall>) {
        if self.leaving.is_some() {
            return;
        }
        let mut parts = self.table.releasable();
        // An extent that goes as a whole takes its ends along.
        let goes = |end: &DpaRange| parts.iter().any(|(range, _)| range.contains(end));
        self.stranded.retain(|end| !goes(end));
        DpaRange::coalesce(&mut self.stranded);
        parts.retain(|(range, _)| !self.untaken.has(range));
        parts.extend(self.stranded.drain(..).map(|range| (range, Vec::new())));
        if parts.is_empty() {
            return;
        }
        let slots: Vec<WindowRange> = parts.iter().flat_map(|(_, slots)| slots.clone()).collect();
        self.table.leave(&slots);
        let ranges = parts.iter().map(|(range, _)| *range).collect();
        // Other hosts go on reading what they share.
        let ours = slots.into_iter().filter(|run| !self.table.is_shared(*run));
        self.device.release(ours.collect(), ranges);
        self.leaving = Some(Leaving {
            parts,
            unasked: recall.is_none_or(|recall| !recall.has_asked()),
            claim: recall.map(|recall| (recall.receipt.id, recall.claimed)),
            taken: Vec::new(),
        });
    }

    /// The device has taken `ranges` by force. What is on its way to it stays so,
    /// also if it has offered it anew before it got the order: the order is for
    /// that as well.
    pub(super) fn taken_from_leaving(&mut self, ranges: &[DpaRange]) {
        if let Some(leaving) = &mut self.leaving {
            leaving.taken.extend(ranges);
            for (_, slots) in &leaving.parts {
                self.table.leave_free(slots);
            }
        }
    }

    /// Whether it is time to offer again what the device did not take; once.
    pub(super) fn offers_again(&mut self, now: Instant) -> bool {
        let due = self.untaken.is_due(now);
        if due {
            self.untaken = Untaken::default();
        }
        due
    }

    /// The device is done with an order. What it did not take becomes ordinary
    /// free memory again, but for what it asked for.
    pub(super) fn handed_over(&mut self, result: Result<(), String>, now: Instant) {
        let Some(leaving) = self.leaving.take() else {
            return;
        };
        let mut released = Vec::new();
        for (range, slots) in leaving.parts {
            if self.table.accepted_in(&range) == 0 {
                released.extend(without(range, &leaving.taken));
            } else {
                self.table.stay(&slots);
                self.untaken.ranges.push(range);
                self.untaken.again = Some(now + AGAIN);
            }
        }
        let mut recall = self.recalls.active.take();
        if let Some(recall) = &mut recall {
            if let Some((id, bytes)) = leaving.claim
                && id == recall.receipt.id
            {
                recall.claimed -= bytes.min(recall.claimed);
            }
            credit(recall, released, leaving.unasked);
        }
        if let Err(error) = result {
            if let Some(recall) = &mut recall {
                recall.device_error = Some(error.clone());
            }
            self.device_error = Some(error);
        }
        self.hand_over(recall.as_ref());
        if let Some(recall) = recall {
            self.go_on(recall, now);
        }
    }
}

/// `range` without what was `taken`.
fn without(range: DpaRange, taken: &[DpaRange]) -> Vec<DpaRange> {
    taken
        .iter()
        .fold(vec![range], |left, taken| taken.cut_from(&left))
}

/// Books what went back to the device: as free if nobody was asked yet, and
/// otherwise under the steps of the chain that clients name.
fn credit(recall: &mut ActiveRecall, released: Vec<DpaRange>, unasked: bool) {
    let bytes: u64 = released.iter().map(|range| range.len).sum();
    let receipt = &mut recall.receipt;
    receipt.returned += bytes;
    receipt
        .ranges
        .extend(released.into_iter().map(DpaSpan::from));
    if unasked {
        receipt.returned_free += bytes;
    } else {
        recall.unsaid += bytes;
        recall.settle();
    }
}

/// An error with its causes, in one line.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
