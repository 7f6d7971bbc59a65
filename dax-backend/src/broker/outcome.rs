//! What a client did about a recall, as it travels in
//! [`Kind::RecallAnswer`](super::protocol::Kind::RecallAnswer).
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::protocol::Message;

/// How long threads waited for memory that was moved, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StallTimes {
    /// How often one waited (a count).
    pub count: u64,
    /// The median wait; with several processes, the worst of their medians.
    pub p50: u64,
    /// What 99 of 100 waits did not exceed; of several, the worst.
    pub p99: u64,
    /// The longest wait.
    pub max: u64,
}

impl StallTimes {
    /// Adds what another process saw.
    pub(super) fn add(&mut self, other: &Self) {
        self.count = self.count.saturating_add(other.count);
        self.p50 = self.p50.max(other.p50);
        self.p99 = self.p99.max(other.p99);
        self.max = self.max.max(other.max);
    }
}

/// Bytes that a client returned, by the step of the chain that freed them,
/// and what that cost. What it refused travels before it, reason by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecallOutcome {
    /// Were idle.
    pub idle: u64,
    /// Were emptied by a purge of the engine.
    pub purged: u64,
    /// Were emptied by what the program dropped when asked.
    pub dropped: u64,
    /// Were in use; the content is on other extents now.
    pub to_extents: u64,
    /// Were in use; the content is in DRAM now.
    pub to_dram: u64,
    /// Were in use; the content is in a file now.
    pub spilled: u64,
    /// Live bytes that were copied for it.
    pub copied: u64,
    /// Microseconds in which memory was moved.
    pub moving_us: u64,
    /// How long threads waited meanwhile.
    pub stalls: StallTimes,
    /// The deadline has passed and the work goes on: another answer follows,
    /// with what came since.
    pub more: bool,
}

/// [`Kind::RecallAnswer`](super::protocol::Kind::RecallAnswer): another one follows.
const ANSWER_MORE: u32 = 1 << 0;

impl RecallOutcome {
    /// Bytes returned by each step, in order.
    pub(super) fn steps(&self) -> [u64; 6] {
        [
            self.idle,
            self.purged,
            self.dropped,
            self.to_extents,
            self.to_dram,
            self.spilled,
        ]
    }

    /// Bytes that were in use and are elsewhere now.
    pub(super) fn moved(&self) -> u64 {
        let moved = self.to_extents.saturating_add(self.to_dram);
        moved.saturating_add(self.spilled)
    }

    /// Adds the bytes of each step.
    pub(super) fn add(&mut self, other: &Self) {
        for (step, more) in [
            (&mut self.idle, other.idle),
            (&mut self.purged, other.purged),
            (&mut self.dropped, other.dropped),
            (&mut self.to_extents, other.to_extents),
            (&mut self.to_dram, other.to_dram),
            (&mut self.spilled, other.spilled),
        ] {
            *step = step.saturating_add(more);
        }
    }

    /// Writes it into a message.
    pub(super) fn write(&self, message: Message) -> Message {
        let [idle, purged, dropped, to_extents, to_dram, spilled] = self.steps();
        let stalls = self.stalls;
        message
            .with_flags(if self.more { ANSWER_MORE } else { 0 })
            .with_numbers(&[
                idle,
                purged,
                dropped,
                to_extents,
                to_dram,
                spilled,
                self.copied,
                self.moving_us,
                stalls.count,
                stalls.p50,
                stalls.p99,
                stalls.max,
            ])
    }

    /// Reads it from a message.
    pub(super) fn read(message: &Message) -> Self {
        let mut numbers = message.numbers();
        let mut next = || numbers.next().unwrap_or(0);
        Self {
            idle: next(),
            purged: next(),
            dropped: next(),
            to_extents: next(),
            to_dram: next(),
            spilled: next(),
            copied: next(),
            moving_us: next(),
            stalls: StallTimes {
                count: next(),
                p50: next(),
                p99: next(),
                max: next(),
            },
            more: message.flags() & ANSWER_MORE != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::Kind;
    use super::*;

    #[test]
    fn every_number_arrives_where_it_was_meant_to() {
        let sent = RecallOutcome {
            idle: 1,
            purged: 2,
            dropped: 3,
            to_extents: 4,
            to_dram: 5,
            spilled: 6,
            copied: 7,
            moving_us: 8,
            stalls: StallTimes {
                count: 9,
                p50: 10,
                p99: 11,
                max: u64::MAX,
            },
            more: true,
        };
        let message = sent.write(Message::new(Kind::RecallAnswer).with_id(3));
        let message = Message::parse(message.bytes()).unwrap();
        assert_eq!(RecallOutcome::read(&message), sent);
        assert_eq!(message.ranges().as_slice(), []);
    }
}
