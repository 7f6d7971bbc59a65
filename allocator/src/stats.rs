//! What a heap holds, counted.
#![forbid(unsafe_code)]

use crate::space::Usage;
use crate::space::rebind::StallHistogram;
use crate::spill::SpillState;

/// A heap at one moment. All in bytes unless the name says otherwise.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Stats {
    /// What the space holds, by backing, with peaks.
    pub usage: Usage,
    /// In pages outside the space that hold something handed out: what was
    /// allocated before the heap started, in DRAM.
    pub outside: u64,
    /// What was in use over the heap's life, `outside` included: a sum of KiB
    /// times milliseconds, counted every 50 ms, in a forked child since the
    /// fork. Only shares and differences of it mean anything.
    pub live_over_time: u64,
    /// The part of `live_over_time` that lay on extents.
    pub extents_over_time: u64,
    /// Handed out to the program.
    pub allocated: u64,
    /// The engine's own structures, in DRAM.
    pub metadata: u64,
    /// Arenas of the heap (a count).
    pub arenas: u32,
    /// Requests for capacity that were answered with some (a count).
    pub grants: u64,
    /// Bytes given back to the source.
    pub returned: u64,
    /// Recalls answered (a count).
    pub recalls: u64,
    /// Bytes that recalls asked for.
    pub recall_asked: u64,
    /// Bytes that recalls got.
    pub recall_returned: u64,
    /// Bytes that recalls did not get.
    pub recall_refused: u64,
    /// Granules whose live content was moved off extents (a count).
    pub evacuated: u64,
    /// Granules that were moved onto extents (a count).
    pub promoted: u64,
    /// Live granules that could not be moved off extents before a fork, and so
    /// are missing in the child (a count, over all forks).
    pub unforked: u64,
    /// Granules that came back from the file (a count).
    pub restored: u64,
    /// Granules that did not: whoever touches them gets SIGBUS (a count).
    pub spill_lost: u64,
    /// Whether granules can be spilled.
    pub spill: SpillState,
    /// Live granules can be moved at all: there is a userfaultfd.
    pub moves_live: bool,
    /// They are moved though the kernel's own accesses can't be made to wait: a
    /// system call that meets one in flight fails with `EFAULT`.
    pub user_moves: bool,
    /// How long threads waited for granules that moved.
    pub stalls: Stalls,
    /// In granules that are pinned.
    pub pinned: u64,
    /// Times that an allocation found the source exhausted (a count).
    pub exhausted: u64,
    /// In granules whose content was lost so far: a device took them by force,
    /// or they were found broken.
    pub lost: u64,
    /// Blocks that the program wanted freed or resized here and that are not of
    /// this heap; they were left alone (a count).
    pub foreign: u64,
    /// Callbacks of the program that panicked (a count).
    pub callback_panics: u64,
    /// Settings that could not be read (a count).
    pub unknown_settings: u32,
}

impl Stats {
    /// Of everything that was in use when most was, how much lay on extents,
    /// in hundredths of a percent.
    pub fn extent_share_at_peak(&self) -> u64 {
        let peak = self.usage.live_peak + self.outside;
        (self.usage.extent_live_at_peak * 10_000)
            .checked_div(peak)
            .unwrap_or(0)
    }
}

/// How long threads waited for granules that moved, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Stalls {
    /// How often one waited (a count).
    pub count: u64,
    /// The median wait.
    pub p50: u64,
    /// What 99 of 100 waits did not exceed.
    pub p99: u64,
    /// The longest wait.
    pub max: u64,
    /// All waits together.
    pub total: u64,
    /// How many waits were shorter than 2 µs, then shorter than 4 µs, and so
    /// on by powers of two (counts); the last bucket has no end.
    pub by_power: [u64; Self::POWERS],
}

/// The first bucket of [`Stalls::by_power`] ends before 2 to the power of this, in ns.
const FIRST_POWER: u32 = 11;

impl Stalls {
    /// None.
    pub const NONE: Self = Self {
        count: 0,
        p50: 0,
        p99: 0,
        max: 0,
        total: 0,
        by_power: [0; Self::POWERS],
    };

    /// Buckets of [`Self::by_power`].
    pub const POWERS: usize = 24;
}

impl From<&StallHistogram> for Stalls {
    fn from(histogram: &StallHistogram) -> Self {
        Self {
            count: histogram.count(),
            p50: histogram.percentile(0.5),
            p99: histogram.percentile(0.99),
            max: histogram.max(),
            total: histogram.total(),
            by_power: histogram.by_power(FIRST_POWER),
        }
    }
}
