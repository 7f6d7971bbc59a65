//! Which memory an allocation is served from.
#![forbid(unsafe_code)]

use crate::space::Tier;

/// Where allocations go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placement {
    /// Everything in DRAM.
    Dram,
    /// Everything on extents.
    Dc,
    /// Allocations of this many bytes and more on extents, the others in DRAM.
    Size(usize),
    /// On extents, but every n-th granule in DRAM.
    Interleave(u32),
}

impl Placement {
    /// Bytes from which `size` placement uses extents unless told otherwise.
    pub const DEFAULT_THRESHOLD: usize = 64 << 10;

    /// The tier that a thread's ordinary `malloc` is bound to.
    pub fn bound_tier(self) -> Tier {
        match self {
            Self::Dram | Self::Size(_) => Tier::Dram,
            Self::Dc | Self::Interleave(_) => Tier::Extent,
        }
    }

    /// Requests below this many bytes go to the bound tier.
    pub fn direct_below(self) -> usize {
        match self {
            Self::Size(threshold) => threshold,
            _ => usize::MAX,
        }
    }
}

impl Default for Placement {
    fn default() -> Self {
        Self::Size(Self::DEFAULT_THRESHOLD)
    }
}

/// What an allocation does when no lent granule is left.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnExhausted {
    /// Takes DRAM, and says so in the statistics.
    #[default]
    Dram,
    /// Fails with ENOMEM.
    Fail,
    /// Waits for capacity this many milliseconds, then fails.
    Wait(u32),
}
