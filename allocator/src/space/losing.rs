//! Granules whose memory is gone: taken by force, or broken.

use core::sync::atomic::Ordering;

use super::granule::{Backing, GRANULE, Owner, PAGE};
use super::pool::wants;
use super::{Space, map};
use crate::source::WindowRange;

impl Space {
    /// Puts something else behind one granule in use whose extent lies in
    /// `gone`: zeroes if `zero` says so of its owner, or what raises SIGBUS.
    /// Whose it is. `None`: there is none, or it is on the move; ask again for the others.
    pub(crate) fn lose(&self, gone: &[WindowRange], zero: impl Fn(Owner) -> bool) -> Option<Owner> {
        let mut state = self.state.lock();
        let index = (0..state.high).find(|&index| {
            let granule = state.granule(index);
            let gone = matches!(granule.backing, Backing::Extent(o) if wants(gone, o));
            gone && !granule.in_flight && !granule.is_idle()
        })?;
        let (at, granule) = (state.addr(index), *state.granule(index));
        // SAFETY: a granule of this space, whose content is gone.
        let zeroed = zero(granule.owner) && unsafe { map::back_with_dram(at, GRANULE) }.is_ok();
        // SAFETY: as above.
        if !zeroed && unsafe { map::back_with_nothing(at, GRANULE) }.is_err() {
            // SAFETY: as above. Whoever touches it gets SIGSEGV, not old data;
            // should the kernel have no memory for that either, the mapping of
            // what is gone stays.
            let _ = unsafe { map::unback(at, GRANULE) };
        }
        let live = u64::from(granule.live.count()) * PAGE as u64;
        let whole = GRANULE as u64;
        let entry = state.granule_mut(index);
        if zeroed {
            entry.backing = Backing::Dram;
            entry.dirty = entry.live;
        } else {
            entry.backing = Backing::Lost;
        }
        state.usage.extent_live -= live;
        state.usage.extent_held -= whole;
        if zeroed {
            state.usage.dram_live += live;
            state.usage.dram_held += whole;
        }
        state.set_gap(index);
        self.lost.fetch_add(whole, Ordering::Relaxed);
        Some(granule.owner)
    }

    /// Whether a granule in use, moving or not, is on an extent in `gone`.
    pub(crate) fn holds_any(&self, gone: &[WindowRange]) -> bool {
        let state = self.state.lock();
        (0..state.high).any(|index| {
            let granule = state.granule(index);
            matches!(granule.backing, Backing::Extent(o) if wants(gone, o)) && !granule.is_idle()
        })
    }

    /// Where in the window the extent behind an address lies.
    pub(crate) fn extent_offset(&self, addr: usize) -> Option<u64> {
        match self.backing_of(addr)? {
            Backing::Extent(offset) => Some(offset),
            _ => None,
        }
    }

    /// Bytes of granules in use whose content was lost.
    pub(crate) fn lost_bytes(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}
