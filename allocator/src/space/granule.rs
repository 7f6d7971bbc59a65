//! What the allocator knows of one granule.
#![forbid(unsafe_code)]

use super::losing::Fate;
use super::pagemap::PageMap;
use crate::source::Refusal;

/// Bytes of a granule: the unit of backing and of moving (2 MiB, the size a
/// page-table entry of the second level maps).
pub const GRANULE: usize = 2 << 20;
/// Bytes of a page, the unit in which the engine asks.
pub const PAGE: usize = 4096;
/// Pages of a granule.
pub const PAGES_PER_GRANULE: usize = GRANULE / PAGE;

/// See [`Backing::Inherited`].
pub const NO_LINE: u8 = u8::MAX;

/// What is behind a granule's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// Nothing: a bare reservation.
    None,
    /// The granule of the window at this offset (bytes).
    Extent(u64),
    /// Anonymous memory.
    Dram,
    /// A file, and a placeholder on which every access waits until the content
    /// is back: always in flight.
    Spilled,
    /// The extent at this offset (bytes) as it was when this process forked:
    /// behind a placeholder that the source serves, and no lease.
    Original(u64),
    /// As `Original`, of an ancestor that forked: its number among those that
    /// left some, or [`NO_LINE`] if nobody says when this process has its copy.
    Inherited(u8),
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

/// Whose pages they are: the heap's own, or those of one arena of the program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner(u16);

impl Owner {
    /// The heap: everything that asks for no arena.
    pub const HEAP: Self = Self(0);

    /// The arena in slot `slot` of the heap's table.
    pub const fn arena(slot: u16) -> Self {
        Self(slot + 1)
    }

    /// Nobody: it has outlived its arena, and is only to be given back.
    pub(super) const NOBODY: Self = Self(0x7ffe);

    /// The slot of the arena; `None`: the heap, or nobody.
    pub fn slot(self) -> Option<usize> {
        match self {
            Self::NOBODY => None,
            _ => self.0.checked_sub(1).map(usize::from),
        }
    }

    /// For a table in which 0 means nobody.
    pub(super) fn to_entry(self) -> u16 {
        self.0 + 1
    }

    /// The inverse of [`Owner::to_entry`].
    pub(super) fn from_entry(entry: u16) -> Option<Self> {
        entry.checked_sub(1).map(Self)
    }
}

/// Who asks for pages, and for which memory. Granules of different domains are
/// never shared, so that what happens to an arena's granules happens to no
/// other's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Domain {
    /// Which memory.
    pub tier: Tier,
    /// Whose.
    pub owner: Owner,
}

impl Domain {
    /// Which index of free runs its granules are in: one for each tier of the
    /// heap, one for all arenas.
    pub(super) fn shelf(self) -> usize {
        match self.owner {
            Owner::HEAP => self.tier as usize,
            _ => SHELVES - 1,
        }
    }
}

impl From<Tier> for Domain {
    fn from(tier: Tier) -> Self {
        Self {
            tier,
            owner: Owner::HEAP,
        }
    }
}

/// How many indexes of free runs there are.
pub(super) const SHELVES: usize = 3;

/// One entry of the granule table, which lives in DRAM.
#[derive(Clone, Copy)]
pub(super) struct Granule {
    /// Pages that the engine holds.
    pub(super) live: PageMap,
    /// Pages that may hold something else than zeroes.
    pub(super) dirty: PageMap,
    pub(super) backing: Backing,
    pub(super) tier: Tier,
    pub(super) owner: Owner,
    /// A rebind is under way: no page of it is handed out meanwhile.
    pub(super) in_flight: bool,
    /// Why it could not be moved; not tried again before the next recall.
    pub(super) refused: Option<Refusal>,
    /// In DRAM because the placement wants it so, not for want of extents.
    pub(super) by_choice: bool,
    /// How many pins keep it where it is.
    pub(super) pins: u16,
    /// Its content was lost while it was on the move, and it is to become this.
    pub(super) fate: Option<Fate>,
    /// When it became empty, in ticks of the service; for its return.
    pub(super) idle_since: u32,
}

impl Granule {
    pub(super) const NEW: Self = Self {
        live: PageMap::EMPTY,
        dirty: PageMap::EMPTY,
        backing: Backing::None,
        tier: Tier::Dram,
        owner: Owner::HEAP,
        in_flight: false,
        refused: None,
        by_choice: false,
        pins: 0,
        fate: None,
        idle_since: 0,
    };

    /// Whom it may serve.
    pub(super) fn domain(&self) -> Domain {
        Domain {
            tier: self.tier,
            owner: self.owner,
        }
    }

    /// Backed by an extent, and nothing of it is in use.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.backing, Backing::Extent(_)) && !self.stays() && self.live.is_empty()
    }

    /// Must not be given away or emptied now, whatever is live in it.
    pub(super) fn stays(&self) -> bool {
        self.in_flight || self.pins > 0
    }

    /// The longest run of pages that can be handed out now.
    pub(super) fn gap(&self) -> usize {
        match self.backing {
            Backing::None | Backing::Spilled | Backing::Lost => 0,
            _ if self.in_flight => 0,
            _ => self.live.longest_gap(),
        }
    }
}
