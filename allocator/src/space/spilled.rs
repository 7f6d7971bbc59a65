//! Granules in the file: which come back, and what of them is freed.

use super::granule::{Backing, Granule};
use super::moving::Move;
use super::pagemap::PageMap;
use super::pool::Pool;
use super::rebind::LivePages;
use super::{Space, map};
use crate::space::GRANULE;

impl Space {
    /// The addresses that granules may have.
    pub fn range(&self) -> core::ops::Range<usize> {
        let state = self.state.lock();
        state.addr(0)..state.addr(state.granules)
    }

    /// Picks the spilled granule at `addr` to come back: to an unused extent if
    /// there is one and `to_extents` says so, otherwise to DRAM. `None`: it is
    /// not spilled.
    pub fn pick_restoring(&self, addr: usize, to_extents: bool) -> Option<Move> {
        let mut state = self.state.lock();
        let index = state.index(addr)?;
        if state.granule(index).backing != Backing::Spilled {
            return None;
        }
        let unused = if to_extents && !state.extents_closed {
            let lot = state.lot(state.granule(index).owner).index();
            state.pools.get_mut(lot).and_then(Pool::take)
        } else {
            None
        };
        let to = match unused {
            Some(offset) => {
                state.usage.idle -= GRANULE as u64;
                Backing::Extent(offset)
            }
            None => Backing::Dram,
        };
        let mut picked = state.new_move(index);
        state.depart(&mut picked, to);
        Some(picked)
    }

    /// The address of a spilled granule.
    pub fn next_spilled(&self) -> Option<usize> {
        let state = self.state.lock();
        if state.usage.spilled_held == 0 {
            return None;
        }
        let spilled = |index: &usize| state.granule(*index).backing == Backing::Spilled;
        (0..state.high).find(spilled).map(|index| state.addr(index))
    }

    /// The address of a spilled granule for which there is an extent.
    pub fn next_restorable(&self) -> Option<usize> {
        let state = self.state.lock();
        if state.usage.spilled_held == 0 {
            return None;
        }
        let restorable = |index: &usize| {
            let granule = state.granule(*index);
            granule.backing == Backing::Spilled && state.has_pooled(granule.owner)
        };
        (0..state.high)
            .find(restorable)
            .map(|index| state.addr(index))
    }

    /// Books the spilled granule at `addr` as lost.
    pub fn lose_spilled(&self, addr: usize) {
        let mut state = self.state.lock();
        if let Some(index) = state.index(addr)
            && state.granule(index).backing == Backing::Spilled
        {
            state.lose_spilled(index);
            state.set_gap(index);
        }
    }

    /// Calls `each` with pages that were freed while they were in the file: the
    /// number of the granule, the pages, and whether that was all of it. Such a
    /// granule is bare from now on.
    pub fn sweep_spilled(&self, mut each: impl FnMut(usize, &LivePages, bool)) {
        let (mut index, mut first) = (0, true);
        loop {
            let freed = {
                let mut state = self.state.lock();
                if first && !core::mem::take(&mut state.spilled_freed) {
                    return;
                }
                first = false;
                let spilled = |index: &usize| state.granule(*index).backing == Backing::Spilled;
                let Some(found) = (index..state.high).find(spilled) else {
                    return;
                };
                index = found;
                let at = state.addr(index);
                let granule = state.granule_mut(index);
                let (live, dirty) = (*granule.live.words(), *granule.dirty.words());
                granule.dirty = PageMap::from_words(live);
                let gone = LivePages(core::array::from_fn(|i| dirty[i] & !live[i]));
                let empty = granule.live.is_empty();
                // SAFETY: nothing of it is live.
                let bare = empty && unsafe { map::unback(at, GRANULE) }.is_ok();
                if bare {
                    state.usage.spilled_held -= GRANULE as u64;
                    *state.granule_mut(index) = Granule::NEW;
                    state.set_gap(index);
                } else if empty {
                    state.spilled_freed = true;
                }
                (gone, bare)
            };
            if freed.0.count() > 0 || freed.1 {
                each(index, &freed.0, freed.1);
            }
            index += 1;
        }
    }
}
