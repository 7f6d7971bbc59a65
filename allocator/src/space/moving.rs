//! Granules on the move: which ones, where to, and the books before and after.
//!
//! While a granule is in flight nothing of it is handed out, so what was live
//! when it was picked is all that can hold something; what is freed meanwhile
//! is copied for nothing, and booked out as ever.

use super::granule::{Backing, GRANULE, Owner, PAGE, Tier};
use super::lots::Lot;
use super::pagemap::PageMap;
use super::pool::wants;
use super::rebind::{LivePages, Memory, RUN, Step};
use super::table::State;
use super::{Space, map};
use crate::source::{Ranges, Refusal, Refusals, WindowRange};

/// Neighbouring granules that have been picked, and where each is to go.
/// To be ended with [`Space::end_move`].
pub struct Move {
    index: usize,
    len: usize,
    addr: usize,
    window: usize,
    from: [Backing; RUN],
    to: [Backing; RUN],
    live: [LivePages; RUN],
}

impl Move {
    /// The address of the first granule.
    pub fn addr(&self) -> usize {
        self.addr
    }

    /// How many granules.
    pub fn granules(&self) -> usize {
        self.len
    }

    /// The number of the first granule.
    pub fn index(&self) -> usize {
        self.index
    }

    /// What is live of granule `i`.
    pub fn live(&self, i: usize) -> &LivePages {
        &self.live[i]
    }

    /// Whether its granules go to the file.
    pub fn is_spill(&self) -> bool {
        self.len > 0 && self.to[0] == Backing::Spilled
    }

    /// Calls `f` with the steps of the rebind.
    pub fn with_steps<T>(&self, f: impl FnOnce(&[Step<'_>]) -> T) -> T {
        let memory = |backing| match backing {
            Backing::Extent(offset) => Memory::Extent(self.window + offset as usize),
            _ => Memory::Dram,
        };
        let steps: [Step<'_>; RUN] = core::array::from_fn(|i| Step {
            from: memory(self.from[i]),
            to: memory(self.to[i]),
            live: &self.live[i],
        });
        f(&steps[..self.len])
    }
}

/// What granules may be picked to leave their extents.
#[derive(Clone, Copy, Debug)]
pub struct Leaving<'a> {
    /// Those inside these ranges; any, if empty.
    pub wanted: &'a [WindowRange],
    /// At most so many.
    pub granules: usize,
    /// Other extents may be taken for them.
    pub to_extents: bool,
    /// DRAM that may be taken for them, in bytes.
    pub dram: u64,
    /// Live bytes of them that may be spilled.
    pub spill: u64,
}

/// What came of a move.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    /// Extents that are free now, to be given back.
    pub freed: Ranges,
    /// Granules that are on other extents now.
    pub to_extents: usize,
    /// Granules that are in DRAM now.
    pub to_dram: usize,
    /// Granules that are in the file now.
    pub spilled: usize,
    /// Live bytes of all.
    pub copied: u64,
}

impl Space {
    /// Picks granules to leave their extents: the one with the least live
    /// pages, and neighbours that may leave too. `None`: none may.
    pub fn pick_leaving(&self, leaving: Leaving<'_>) -> Option<Move> {
        let mut state = self.state.lock();
        let may = |state: &State, index: usize| {
            index < state.high && {
                let granule = state.granule(index);
                !granule.stays()
                    && granule.refused.is_none()
                    && !granule.live.is_empty()
                    && matches!(granule.backing, Backing::Extent(o) if wants(leaving.wanted, o))
            }
        };
        let least = |&index: &usize| state.granule(index).live.count();
        let first = (0..state.high)
            .filter(|&index| may(&state, index))
            .min_by_key(least)?;
        let mut picked = state.new_move(first);
        let (mut dram, mut spill) = (leaving.dram, leaving.spill);
        while picked.len < RUN.min(leaving.granules) && may(&state, first + picked.len) {
            let spilling = picked.is_spill();
            let bytes = u64::from(state.granule(first + picked.len).live.count()) * PAGE as u64;
            let other = if leaving.to_extents && !spilling {
                let owner = state.granule(first + picked.len).owner;
                let lot = state.lot(owner).index();
                // Nobody's is only to be given back.
                let pool = state.pools.get_mut(lot);
                pool.and_then(|pool| pool.take_outside(leaving.wanted))
            } else {
                None
            };
            let to = match other {
                Some(offset) => {
                    state.usage.idle -= GRANULE as u64;
                    Backing::Extent(offset)
                }
                None if dram >= GRANULE as u64 && !spilling => {
                    dram -= GRANULE as u64;
                    Backing::Dram
                }
                None if spill >= bytes && (spilling || picked.len == 0) => {
                    spill -= bytes;
                    Backing::Spilled
                }
                None => break,
            };
            state.depart(&mut picked, to);
        }
        (picked.len > 0).then_some(picked)
    }

    /// Picks granules that are in DRAM for want of extents, to go to unused
    /// ones. `None`: there are none of the one or of the other.
    pub fn pick_returning(&self, granules: usize) -> Option<Move> {
        let mut state = self.state.lock();
        let may = |state: &State, index: usize| {
            index < state.high && {
                let granule = state.granule(index);
                granule.tier == Tier::Extent
                    && granule.backing == Backing::Dram
                    && !(granule.stays() || granule.refused.is_some() || granule.by_choice)
                    && state.has_pooled(granule.owner)
            }
        };
        let first = (0..state.high).find(|&index| may(&state, index))?;
        let mut picked = state.new_move(first);
        while picked.len < RUN.min(granules) && may(&state, first + picked.len) {
            let owner = state.granule(first + picked.len).owner;
            let lot = state.lot(owner).index();
            let Some(offset) = state.pools[lot].take() else {
                break;
            };
            state.usage.idle -= GRANULE as u64;
            state.depart(&mut picked, Backing::Extent(offset));
        }
        (picked.len > 0).then_some(picked)
    }

    /// Granules in DRAM or spilled for want of extents, which could move to
    /// some of a lot.
    pub fn displaced(&self, lot: Lot) -> usize {
        let state = self.state.lock();
        let displaced = |&index: &usize| {
            let granule = state.granule(index);
            if state.lot(granule.owner) != lot {
                return false;
            }
            granule.backing == Backing::Spilled
                || granule.tier == Tier::Extent
                    && granule.backing == Backing::Dram
                    && !(granule.by_choice || granule.refused.is_some() || granule.stays())
        };
        (0..state.high).filter(displaced).count()
    }

    /// Books a move that is done; `stayed` says why granule `i` has its old
    /// backing still, if it has.
    pub fn end_move(&self, ended: Move, stayed: &[Option<Refusal>; RUN]) -> Ended {
        let mut state = self.state.lock();
        let mut result = Ended {
            freed: Ranges::EMPTY,
            to_extents: 0,
            to_dram: 0,
            spilled: 0,
            copied: 0,
        };
        for (i, stayed) in stayed.iter().enumerate().take(ended.len) {
            if stayed.is_none() {
                result.copied += u64::from(ended.live[i].count()) * PAGE as u64;
                match ended.to[i] {
                    Backing::Extent(_) => result.to_extents += 1,
                    Backing::Spilled => result.spilled += 1,
                    _ => result.to_dram += 1,
                }
            }
            for offset in state.arrive(&ended, i, *stayed).into_iter().flatten() {
                let len = GRANULE as u64;
                result.freed.push(WindowRange { offset, len });
            }
        }
        result
    }

    /// Says of up to `bytes` of live granules on extents, of `wanted` or any if
    /// that is empty, why they stay: each its own reason, or else `otherwise`.
    pub fn why_stayed(&self, wanted: &[WindowRange], bytes: u64, otherwise: Refusal) -> Refusals {
        let state = self.state.lock();
        let mut refused = Refusals::NONE;
        for with_reason in [true, false] {
            for index in 0..state.high {
                let granule = state.granule(index);
                let Backing::Extent(offset) = granule.backing else {
                    continue;
                };
                let left = bytes.saturating_sub(refused.bytes());
                if left == 0 {
                    return refused;
                }
                let pinned = (granule.pins > 0).then_some(Refusal::Pinned);
                let known = pinned.or(granule.refused);
                if known.is_some() == with_reason && !granule.is_idle() && wants(wanted, offset) {
                    let len = (GRANULE as u64).min(left);
                    let reason = known.unwrap_or(otherwise);
                    refused.add(reason, WindowRange { offset, len });
                }
            }
        }
        refused
    }

    /// Lets granules be picked again that once could not be moved.
    pub fn forgive(&self) {
        let mut state = self.state.lock();
        for index in 0..state.high {
            state.granule_mut(index).refused = None;
        }
    }

    /// Gives what was allocated before there was a source to the DRAM tier:
    /// the stacks and tables of the heap's own threads are among it, and must
    /// never be behind a placeholder.
    pub fn settle(&self) {
        let mut state = self.state.lock();
        for index in 0..state.high {
            if state.granule(index).owner == Owner::HEAP {
                state.granule_mut(index).tier = Tier::Dram;
                state.set_gap(index);
            }
        }
    }
}

impl State {
    pub(super) fn new_move(&self, index: usize) -> Move {
        Move {
            index,
            len: 0,
            addr: self.addr(index),
            window: self.window,
            from: [Backing::None; RUN],
            to: [Backing::None; RUN],
            live: [LivePages([0; 8]); RUN],
        }
    }

    /// Adds the next granule to a move.
    pub(super) fn depart(&mut self, picked: &mut Move, to: Backing) {
        let (index, i) = (picked.index + picked.len, picked.len);
        let granule = self.granule_mut(index);
        granule.in_flight = true;
        picked.from[i] = granule.backing;
        picked.to[i] = to;
        picked.live[i] = LivePages(*granule.live.words());
        picked.len += 1;
        self.set_gap(index);
    }

    /// Books granule `i` of a move as where it is now; the extents it freed.
    fn arrive(&mut self, ended: &Move, i: usize, stayed: Option<Refusal>) -> [Option<u64>; 2] {
        let (index, at) = (ended.index + i, ended.addr + i * GRANULE);
        let moved = stayed.is_none();
        let (now, other) = if moved {
            (ended.to[i], ended.from[i])
        } else {
            (ended.from[i], ended.to[i])
        };
        if self.granule(index).backing == Backing::Lost {
            // Its content did not come back; what was to take it is unused.
            return [self.unneeded(other), None];
        }
        let granule = self.granule_mut(index);
        granule.in_flight = now == Backing::Spilled;
        granule.refused = stayed;
        granule.backing = now;
        if moved {
            // Only what was live was copied, and the rest is as new, or was
            // zeroed by the lender.
            granule.dirty = PageMap::from_words(ended.live[i].0);
        }
        let live = u64::from(granule.live.count()) * PAGE as u64;
        self.count_out(ended.from[i], live);
        self.count_in(now, live);
        if live == 0 {
            self.granule_mut(index).fate = None;
            self.emptied_in_flight(index, at);
        }
        self.usage.note_peaks();
        self.set_gap(index);
        let fate = self.granule(index).fate;
        let lost = match fate.filter(|_| now != Backing::Spilled) {
            Some(fate) => self.lose_at(index, fate),
            None => None,
        };
        // The one that it left, or the one it was meant for: that may hold
        // copied bytes, and only its lender makes it zeroes again.
        [self.unneeded(other), lost]
    }

    /// Books a backing as nobody's; its extent is to be given back.
    pub(super) fn unneeded(&mut self, backing: Backing) -> Option<u64> {
        let Backing::Extent(offset) = backing else {
            return None;
        };
        self.usage.extent_held -= GRANULE as u64;
        Some(offset)
    }

    pub(super) fn count_out(&mut self, backing: Backing, live: u64) {
        let usage = &mut self.usage;
        match backing {
            Backing::Extent(_) => usage.extent_live -= live,
            Backing::Dram => {
                usage.dram_live -= live;
                usage.dram_held -= GRANULE as u64;
            }
            Backing::Spilled => {
                usage.spilled -= live;
                usage.spilled_held -= GRANULE as u64;
            }
            Backing::None | Backing::Original(_) | Backing::Inherited(_) | Backing::Lost => {}
        }
    }

    pub(super) fn count_in(&mut self, backing: Backing, live: u64) {
        let usage = &mut self.usage;
        match backing {
            Backing::Extent(_) => usage.extent_live += live,
            Backing::Dram => {
                usage.dram_live += live;
                usage.dram_held += GRANULE as u64;
            }
            Backing::Spilled => {
                usage.spilled += live;
                usage.spilled_held += GRANULE as u64;
                // What was freed while it was written.
                self.spilled_freed = true;
            }
            Backing::None | Backing::Original(_) | Backing::Inherited(_) | Backing::Lost => {}
        }
    }

    /// Books a spilled granule whose content did not come back.
    pub(super) fn lose_spilled(&mut self, index: usize) {
        let live = u64::from(self.granule(index).live.count()) * PAGE as u64;
        self.count_out(Backing::Spilled, live);
        self.granule_mut(index).backing = Backing::Lost;
        self.granule_mut(index).in_flight = true;
    }

    /// What `free_within` puts off while a granule is in flight, or pinned.
    pub(super) fn emptied_in_flight(&mut self, index: usize, at: usize) {
        match self.granule(index).backing {
            Backing::Extent(_) => {
                let tick = self.tick;
                self.granule_mut(index).idle_since = tick;
                self.usage.idle += GRANULE as u64;
            }
            // SAFETY: nothing of it is live.
            Backing::Dram if unsafe { map::unback(at, GRANULE) }.is_ok() => {
                self.granule_mut(index).backing = Backing::None;
                self.usage.dram_held -= GRANULE as u64;
            }
            _ => {}
        }
    }
}
