//! Putting memory behind granules and taking it away again.

use core::ops::Range;

use super::granule::{Backing, Domain, GRANULE, Granule, PAGE, PAGES_PER_GRANULE, Tier};
use super::map;
use super::table::State;

impl State {
    /// Puts memory behind those of a run of granules that are bare. `false`:
    /// nothing lent is left and DRAM won't do, or the kernel has none; what
    /// was bare is bare again, or idle.
    pub(super) fn back_run(&mut self, run: Range<usize>, domain: Domain, dram: bool) -> bool {
        let tier = domain.tier;
        let lot = self.lot(domain.owner).index();
        let mut index = run.start;
        while index < run.end {
            if self.granule(index).backing != Backing::None {
                index += 1;
                continue;
            }
            let by_choice = self.interleaves(domain);
            let lent = tier == Tier::Extent && !by_choice && !self.extents_closed;
            if lent
                && (self.back_with_lent(index, domain) || self.back_with_idle(index, domain, &run))
            {
                index += 1;
                continue;
            }
            let bare = |index: &usize| self.granule(*index).backing == Backing::None;
            let count = match lent && self.pools[lot].count() > 0 || by_choice {
                // The next one may be mapped, or is not DRAM by choice.
                true => 1,
                false => (index..run.end).take_while(bare).count(),
            };
            let allowed = tier == Tier::Dram || by_choice || dram;
            if !allowed || !self.back_with_dram(index..index + count, domain, by_choice) {
                self.unback_unused(run.start..index);
                return false;
            }
            index += count;
        }
        true
    }

    /// Whether the next granule of a domain is DRAM by choice.
    fn interleaves(&mut self, domain: Domain) -> bool {
        if domain != Tier::Extent.into() || self.dram_every == 0 {
            return false;
        }
        self.interleaved = self.interleaved.wrapping_add(1);
        self.interleaved.is_multiple_of(self.dram_every)
    }

    /// `false`: nothing lent is left, or the window can't be mapped here
    /// (`RLIMIT_AS` counts the duplicate before it takes the place of the
    /// reservation; DRAM still can).
    fn back_with_lent(&mut self, index: usize, domain: Domain) -> bool {
        let lot = self.lot(domain.owner).index();
        let Some(offset) = self.pools[lot].take() else {
            return false;
        };
        let (at, alias) = (self.addr(index), self.window + offset as usize);
        // SAFETY: a bare granule, and an offset that `lend` found to lie
        // inside the window.
        if unsafe { map::back_with_extent(at, alias, GRANULE) }.is_err() {
            self.pools[lot].put(offset);
            return false;
        }
        self.now_backed(index, Backing::Extent(offset), domain, false);
        true
    }

    /// Gives a bare granule the extent of an idle one outside of `run`, for
    /// runs that need more neighbours than are idle side by side.
    fn back_with_idle(&mut self, index: usize, domain: Domain, run: &Range<usize>) -> bool {
        let lot = self.lot(domain.owner);
        let idle = |&i: &usize| {
            let granule = self.granule(i);
            !run.contains(&i) && granule.is_idle() && self.lot(granule.owner) == lot
        };
        let Some(from) = (0..self.high).rev().find(idle) else {
            return false;
        };
        let Granule { backing, dirty, .. } = *self.granule(from);
        let Backing::Extent(offset) = backing else {
            return false;
        };
        let (at, alias) = (self.addr(index), self.window + offset as usize);
        // SAFETY: a bare granule, and an extent of this space's that nothing
        // lives on.
        if unsafe { map::back_with_extent(at, alias, GRANULE) }.is_err() {
            return false;
        }
        self.now_backed(index, backing, domain, false);
        self.granule_mut(index).dirty = dirty;
        // SAFETY: nothing in it is live. Should the kernel have no memory for
        // the change, the old mapping stays behind a bare granule, unused.
        let _ = unsafe { map::unback(self.addr(from), GRANULE) };
        *self.granule_mut(from) = Granule::NEW;
        self.set_gap(from);
        true
    }

    fn back_with_dram(&mut self, run: Range<usize>, domain: Domain, by_choice: bool) -> bool {
        let len = run.len() * GRANULE;
        // SAFETY: bare granules of this space.
        if unsafe { map::back_with_dram(self.addr(run.start), len) }.is_err() {
            return false;
        }
        self.usage.dram_held += len as u64;
        for index in run {
            self.now_backed(index, Backing::Dram, domain, by_choice);
        }
        true
    }

    fn now_backed(&mut self, index: usize, backing: Backing, domain: Domain, by_choice: bool) {
        let idle_since = self.tick;
        *self.granule_mut(index) = Granule {
            backing,
            tier: domain.tier,
            owner: domain.owner,
            by_choice,
            idle_since,
            ..Granule::NEW
        };
        self.set_gap(index);
    }

    /// Lets go of DRAM in which nothing is live.
    fn unback_unused(&mut self, run: Range<usize>) {
        for index in run {
            let granule = self.granule(index);
            if granule.backing == Backing::Dram && granule.live.is_empty() && !granule.stays() {
                self.unback_dram(index..index + 1);
            }
        }
    }

    /// Books pages as free, and lets go of DRAM that nothing uses any more.
    pub(super) fn free_pages(&mut self, addr: usize, len: usize) {
        let (mut at, end) = (addr, addr + len);
        let mut emptied = 0..0;
        while at < end {
            let Some(index) = self.index(at) else { return };
            let start = (at - self.addr(index)) / PAGE;
            let pages = ((end - at) / PAGE).min(PAGES_PER_GRANULE - start);
            if self.free_within(index, start, pages) {
                if emptied.end != index {
                    // One on an extent lies between.
                    self.unback_dram(emptied);
                    emptied = index..index;
                }
                emptied.end = index + 1;
            }
            at += pages * PAGE;
        }
        self.unback_dram(emptied);
    }

    /// Books pages of one granule as free. `true`: it is DRAM, and empty now.
    /// Those of one call are neighbours.
    fn free_within(&mut self, index: usize, start: usize, pages: usize) -> bool {
        let (at, tick) = (self.addr(index), self.tick);
        let granule = self.granule_mut(index);
        debug_assert!(
            granule.live.contains(start, pages),
            "pages freed that are not live"
        );
        granule.live.remove(start, pages);
        let (backing, stays, empty) = (granule.backing, granule.stays(), granule.live.is_empty());
        let bytes = (pages * PAGE) as u64;
        match backing {
            // What is dropped would come back as it was at the fork.
            Backing::Original(_) => self.usage.extent_live -= bytes,
            Backing::Inherited(_) => self.usage.inherited -= bytes,
            Backing::Extent(_) => {
                granule.idle_since = tick;
                // In a child that lost its extents they count for nothing.
                self.usage.extent_live = self.usage.extent_live.saturating_sub(bytes);
                if empty && !stays {
                    self.usage.idle += GRANULE as u64;
                }
            }
            Backing::Dram => {
                // SAFETY: the engine gave these pages back; nobody else may
                // read them, and they are neither on the move nor pinned.
                let drop = || unsafe { map::drop_pages(at + start * PAGE, pages * PAGE) };
                if !stays && !empty && drop().is_ok() {
                    granule.dirty.remove(start, pages);
                }
                self.usage.dram_live -= bytes;
            }
            Backing::Spilled => {
                self.usage.spilled -= bytes;
                self.spilled_freed = true;
            }
            Backing::None | Backing::Lost => {}
        }
        self.set_gap(index);
        backing == Backing::Dram && empty && !stays
    }

    /// Makes empty granules in DRAM bare. Where the kernel has no memory for
    /// that they stay, and are used again.
    fn unback_dram(&mut self, run: Range<usize>) {
        let len = run.len() * GRANULE;
        if len == 0 {
            return;
        }
        // SAFETY: nothing in them is live.
        if unsafe { map::unback(self.addr(run.start), len) }.is_ok() {
            self.usage.dram_held -= len as u64;
            for index in run {
                *self.granule_mut(index) = Granule::NEW;
                self.set_gap(index);
            }
        }
    }

    /// Makes an idle granule bare; its extent is the caller's. `false`: the
    /// kernel has no memory for the change, and the granule stays as it was.
    pub(super) fn unback_idle(&mut self, index: usize) -> bool {
        debug_assert!(self.granule(index).is_idle());
        // SAFETY: an idle granule of this space holds nothing live.
        if unsafe { map::unback(self.addr(index), GRANULE) }.is_err() {
            return false;
        }
        *self.granule_mut(index) = Granule::NEW;
        self.set_gap(index);
        true
    }

    /// The first run of neighbours that a child does not inherit, from a granule
    /// on: those on extents, or spilled, and where a fork would not wait any
    /// longer for a move out of DRAM, what was in flight.
    pub(super) fn next_extents(&self, from: usize) -> Option<Range<usize>> {
        let away = |index: &usize| {
            let granule = self.granule(*index);
            match granule.backing {
                Backing::Extent(_) | Backing::Spilled => true,
                Backing::Dram => granule.in_flight,
                _ => false,
            }
        };
        let first = (from..self.high).find(away)?;
        let len = (first..self.high).take_while(away).count();
        Some(first..first + len)
    }

    /// In a child: plugs the hole where a run on extents is in its parent. It
    /// is bare from now on, but where something was live nothing may be
    /// handed out.
    pub(super) fn disown(&mut self, run: Range<usize>) {
        let (at, len) = (self.addr(run.start), run.len() * GRANULE);
        // SAFETY: nothing is mapped there in this process.
        let plugged = unsafe { map::unback(at, len) }.is_ok();
        for index in run {
            let granule = self.granule_mut(index);
            if plugged && granule.live.is_empty() {
                *granule = Granule::NEW;
            } else {
                granule.backing = Backing::Lost;
                granule.in_flight = true;
            }
            self.set_gap(index);
        }
    }
}
