//! What came of a recall, step by step of the chain.
#![forbid(unsafe_code)]

use core::fmt;
use core::time::Duration;

use crate::source::{Ranges, WindowRange};
use crate::stats::Stalls;

/// What came of a recall, in bytes by the step that returned them. The steps
/// are in the order in which they are tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecallOutcome {
    /// Were idle: leased, and nothing used them.
    pub idle: u64,
    /// Were emptied by a purge of the engine.
    pub purged: u64,
    /// Were emptied by what programs dropped when they were asked to.
    pub dropped: u64,
    /// Were in use; their content was moved to extents that stay.
    pub to_extents: u64,
    /// Were in use; their content was moved to DRAM.
    pub to_dram: u64,
    /// Were in use; their content is in a file, and comes back when touched.
    pub spilled: u64,
    /// Could not be given back, by reason.
    pub refused: Refusals,
    /// Live bytes that were copied for all this.
    pub copied: u64,
    /// Time in which granules were moved.
    pub moving: Duration,
    /// How long threads waited for granules of this recall.
    pub stalls: Stalls,
    /// The deadline has passed, the work goes on, and another outcome follows
    /// that says what was returned since.
    pub more: bool,
}

impl RecallOutcome {
    /// Bytes of granules that were in use and were moved.
    pub fn moved(&self) -> u64 {
        self.to_extents + self.to_dram + self.spilled
    }

    /// Bytes given back.
    pub fn returned(&self) -> u64 {
        self.idle + self.purged + self.dropped + self.moved()
    }
}

/// Why bytes of a recall were not returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[repr(usize)]
pub enum Refusal {
    /// Live data, and this process can not move it (no userfaultfd, a fork
    /// under way, or a read or write with `O_DIRECT` that did not end in time).
    CannotMove,
    /// The deadline passed first.
    Deadline,
    /// Pinned for DMA.
    Pinned,
    /// There is no DRAM left to move to (`dram_limit`, the cgroup, or the
    /// machine), and nothing is spilled (`spill_dir` is not set).
    NoDram,
    /// The program changed the mapping (mprotect, mlock, pkey).
    MappingChanged,
    /// There is no DRAM left, and `spill_limit` is reached.
    SpillFull,
    /// There is no DRAM left, and the file could not be written.
    SpillFailed,
    /// The process has nearly as many mappings as it may (`vm.max_map_count`).
    Mappings,
}

impl Refusal {
    const ALL: [Self; 8] = [
        Self::CannotMove,
        Self::Deadline,
        Self::Pinned,
        Self::NoDram,
        Self::MappingChanged,
        Self::SpillFull,
        Self::SpillFailed,
        Self::Mappings,
    ];
}

/// What was refused for one reason.
#[derive(Clone, Copy, Debug)]
pub struct Refused {
    /// Why.
    pub reason: Refusal,
    /// How much.
    pub bytes: u64,
    /// Where; what finds no room in here goes unnamed.
    pub ranges: Ranges,
}

/// What was refused, reason by reason.
#[derive(Clone, Copy)]
pub struct Refusals([Refused; Refusal::ALL.len()]);

impl Refusals {
    /// Nothing.
    pub const NONE: Self = {
        let mut all = [Refused {
            reason: Refusal::CannotMove,
            bytes: 0,
            ranges: Ranges::EMPTY,
        }; Refusal::ALL.len()];
        let mut i = 0;
        while i < all.len() {
            all[i].reason = Refusal::ALL[i];
            i += 1;
        }
        Self(all)
    };

    /// Adds a range that is refused.
    pub fn add(&mut self, reason: Refusal, range: WindowRange) {
        let refused = &mut self.0[reason as usize];
        refused.bytes += range.len;
        refused.ranges.push(range);
    }

    /// Bytes refused for any reason.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|refused| refused.bytes).sum()
    }

    /// Bytes refused for this reason.
    pub fn of(&self, reason: Refusal) -> u64 {
        self.0[reason as usize].bytes
    }

    /// The reasons that there are.
    pub fn iter(&self) -> impl Iterator<Item = &Refused> {
        self.0.iter().filter(|refused| refused.bytes > 0)
    }
}

impl fmt::Debug for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl Default for Refusals {
    fn default() -> Self {
        Self::NONE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_bytes_and_ranges() {
        let mut refused = Refusals::NONE;
        for (i, reason) in Refusal::ALL.into_iter().enumerate() {
            let offset = 100 * i as u64;
            refused.add(reason, WindowRange { offset, len: 3 });
            refused.add(
                reason,
                WindowRange {
                    offset: offset + 3,
                    len: 4,
                },
            );
            assert_eq!(refused.of(reason), 7);
        }
        assert_eq!(refused.bytes(), 7 * Refusal::ALL.len() as u64);
        for (i, refused) in refused.iter().enumerate() {
            assert_eq!(refused.reason, Refusal::ALL[i]);
            let offset = 100 * i as u64;
            assert_eq!(refused.ranges.as_slice(), [WindowRange { offset, len: 7 }]);
        }
        assert_eq!(Refusals::NONE.iter().count(), 0);
    }
}
