//! Lots: lent capacity with a tag is for the arenas with that tag alone, and
//! what has none is for everybody else.
//!
//! A lot is a place in a short list of tags; place 0 is for no tag. Whose pages
//! a granule holds decides which lot its extent is of, so that nothing has to be
//! kept for each granule of the window.
#![forbid(unsafe_code)]

use super::Space;
use super::granule::{Backing, GRANULE, Owner};
use super::table::State;
use crate::source::Ranges;
use crate::tag::Tag;

/// Tags that a process may use at a time, and one more for none.
pub const LOTS: usize = 16;
/// Owners that there may be: the heap, and one for each arena.
const OWNERS: usize = 257;

/// A place in the list of tags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lot(u8);

impl Lot {
    /// Capacity without a tag.
    pub const UNTAGGED: Self = Self(0);
    /// What is to be given back and used by nobody.
    pub(super) const NOBODYS: Self = Self(LOTS as u8);

    /// Its place in the list.
    pub fn index(self) -> usize {
        self.0.into()
    }

    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..LOTS as u8).map(Self)
    }

    /// As [`Lot::all`], and what is nobody's.
    pub(crate) fn with_nobodys() -> impl Iterator<Item = Self> {
        Self::all().chain([Self::NOBODYS])
    }
}

/// Which tags there are, and who uses them.
pub(super) struct Lots {
    tags: [Tag; LOTS],
    /// Arenas that have each.
    users: [u16; LOTS],
    /// The lot of each owner, also after its arena has ended.
    of: [u8; OWNERS],
    /// There is more than the untagged one.
    any: bool,
}

impl Lots {
    pub(super) const NEW: Self = Self {
        tags: [Tag::NONE; LOTS],
        users: [0; LOTS],
        of: [0; OWNERS],
        any: false,
    };

    fn find(&self, tag: Tag) -> Option<Lot> {
        let found = self.tags.iter().position(|known| *known == tag);
        found.map(|index| Lot(index as u8))
    }
}

impl State {
    /// Which capacity an owner is served from.
    pub(super) fn lot(&self, owner: Owner) -> Lot {
        if !self.lots.any {
            return Lot::UNTAGGED;
        }
        let index = usize::from(owner.to_entry()) - 1;
        self.lots
            .of
            .get(index)
            .map_or(Lot::NOBODYS, |lot| Lot(*lot))
    }

    /// Lent granules of a lot that nothing uses, mapped or not.
    pub(super) fn idle_of(&self, lot: Lot) -> usize {
        if !self.lots.any {
            return match lot {
                Lot::UNTAGGED => self.usage.idle as usize / GRANULE,
                _ => 0,
            };
        }
        let idle = |&index: &usize| {
            let granule = self.granule(index);
            granule.is_idle() && self.lot(granule.owner) == lot
        };
        let pooled = self.pools.get(lot.index()).map_or(0, |pool| pool.count());
        (0..self.high).filter(idle).count() + pooled
    }

    /// Whether there is a granule that is leased and mapped nowhere for an owner.
    pub(super) fn has_pooled(&self, owner: Owner) -> bool {
        let pool = self.pools.get(self.lot(owner).index());
        pool.is_some_and(|pool| pool.count() > 0)
    }

    /// Whether a lot has nothing and nobody.
    fn is_unused(&self, lot: Lot) -> bool {
        let of_lot = |&index: &usize| {
            let granule = self.granule(index);
            granule.backing != Backing::None && self.lot(granule.owner) == lot
        };
        self.lots.users[lot.index()] == 0
            && self.pools[lot.index()].count() == 0
            && !(0..self.high).any(|index| of_lot(&index))
    }

    /// Serves an arena from the capacity with `tag` from now on. `false`: there
    /// are as many tags in use as there can be.
    fn assign(&mut self, owner: Owner, tag: Tag) -> bool {
        let known = self.lots.find(tag);
        let unused = || Lot::all().skip(1).find(|lot| self.is_unused(*lot));
        let Some(lot) = known.or_else(unused) else {
            return false;
        };
        self.lots.any |= lot != Lot::UNTAGGED;
        let before = self.lot(owner);
        if before != lot {
            // What an earlier arena in this place has left is of another tag.
            for index in 0..self.high {
                let granule = self.granule(index);
                if granule.owner == owner
                    && granule.live.is_empty()
                    && granule.backing != Backing::None
                {
                    self.granule_mut(index).owner = Owner::NOBODY;
                    self.set_gap(index);
                }
            }
        }
        self.lots.tags[lot.index()] = tag;
        self.lots.users[lot.index()] += 1;
        self.lots.of[usize::from(owner.to_entry()) - 1] = lot.index() as u8;
        true
    }
}

impl Space {
    /// Serves an arena from the capacity with `tag` (from that without one, if
    /// it is none) until [`Space::unassign`]. `false`: there are as many tags
    /// in use as there can be.
    pub(crate) fn assign(&self, owner: Owner, tag: Tag) -> bool {
        let mut state = self.state.lock();
        let known = state.lots.find(tag).is_some();
        let assigned = state.assign(owner, tag);
        if assigned && !known {
            // What was said of the tag that had the place before.
            self.set_lot_exhausted(state.lot(owner), false);
        }
        assigned
    }

    /// The arena has ended. What it leaves is given back as it ages.
    pub(crate) fn unassign(&self, owner: Owner) {
        let mut state = self.state.lock();
        let lot = state.lot(owner).index();
        if let Some(users) = state.lots.users.get_mut(lot) {
            *users = users.saturating_sub(1);
        }
    }

    /// Which capacity an owner is served from.
    pub(crate) fn lot(&self, owner: Owner) -> Lot {
        self.state.lock().lot(owner)
    }

    /// Adds lent granules with this tag to those of its lot, if there is one.
    pub(crate) fn lend_tagged(&self, tag: Tag, ranges: &Ranges) -> Option<Lot> {
        let mut state = self.state.lock();
        let lot = state.lots.find(tag)?;
        self.lend_to(&mut state, lot, ranges);
        Some(lot)
    }

    /// The tag of a lot.
    pub(crate) fn tag_of(&self, lot: Lot) -> Tag {
        self.state.lock().lots.tags[lot.index()]
    }

    /// Lots that have a tag.
    pub(crate) fn has_tags(&self) -> bool {
        self.state.lock().lots.any
    }

    /// Leased granules of a lot that nothing uses, mapped or not.
    pub(crate) fn idle_of(&self, lot: Lot) -> usize {
        self.state.lock().idle_of(lot)
    }
}
