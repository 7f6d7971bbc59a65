//! What the allocator knows of one granule.
#![forbid(unsafe_code)]

use super::pagemap::PageMap;

/// Bytes of a granule: the unit of backing and of moving (2 MiB, the size a
/// page-table entry of the second level maps).
pub const GRANULE: usize = 2 << 20;
/// Bytes of a page, the unit in which the engine asks.
pub const PAGE: usize = 4096;
/// Pages of a granule.
pub const PAGES_PER_GRANULE: usize = GRANULE / PAGE;

/// What is behind a granule's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Nothing: a bare reservation.
    None,
    /// The granule of the window at this offset (bytes).
    Extent(u64),
    /// Anonymous memory.
    Dram,
    /// The extent at this offset (bytes) as it was when this process forked:
    /// behind a placeholder that the source serves, and no lease.
    Original(u64),
    /// An extent that a forked child does not have: inaccessible.
    Lost,
}

/// Which memory an arena asks for. Granules of different tiers are never
/// shared, so that what asked for DRAM never travels with an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(usize)]
pub enum Tier {
    /// DRAM, always.
    Dram = 0,
    /// Extents, or what `on_exhausted` says when there are none.
    Extent = 1,
}

/// How many tiers there are.
pub(super) const TIERS: usize = 2;

/// One entry of the granule table, which lives in DRAM.
#[derive(Clone, Copy)]
pub(super) struct Granule {
    /// Pages that the engine holds.
    pub(super) live: PageMap,
    /// Pages that may hold something else than zeroes.
    pub(super) dirty: PageMap,
    pub(super) backing: Backing,
    pub(super) tier: Tier,
    /// A rebind is under way: no page of it is handed out meanwhile.
    pub(super) in_flight: bool,
    /// It could not be moved; not tried again before the next recall.
    pub(super) refused: bool,
    /// In DRAM because the placement wants it so, not for want of extents.
    pub(super) by_choice: bool,
    /// Inherited behind a placeholder: a page of it that is dropped reads as it
    /// did at the fork, and not as zeroes.
    pub(super) inherited: bool,
    /// When it became empty, in ticks of the service; for its return.
    pub(super) idle_since: u32,
}

impl Granule {
    pub(super) const NEW: Self = Self {
        live: PageMap::EMPTY,
        dirty: PageMap::EMPTY,
        backing: Backing::None,
        tier: Tier::Dram,
        in_flight: false,
        refused: false,
        by_choice: false,
        inherited: false,
        idle_since: 0,
    };

    /// Backed by an extent, and nothing of it is in use.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.backing, Backing::Extent(_)) && !self.in_flight && self.live.is_empty()
    }

    /// In DRAM, and not for want of extents.
    pub(super) fn is_here_to_stay(&self) -> bool {
        self.by_choice || self.inherited
    }

    /// The longest run of pages that can be handed out now.
    pub(super) fn gap(&self) -> usize {
        match self.backing {
            Backing::None | Backing::Lost => 0,
            _ if self.in_flight => 0,
            _ => self.live.longest_gap(),
        }
    }
}
