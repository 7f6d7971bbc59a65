//! Pins: granules that stay where they are, because a device writes to them.
#![forbid(unsafe_code)]

use super::Space;
use super::granule::{Backing, GRANULE, PAGE};

/// What came of an attempt to pin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TryPin {
    Pinned,
    /// Some of it is on the move; it soon is not.
    Moving,
    /// Some of it is not in use, lost, or not of this space.
    Foreign,
    /// A granule has 65,535 pins.
    TooMany,
}

impl Space {
    /// Pins the granules that `len` bytes at `addr` lie in; all or none.
    pub(crate) fn try_pin(&self, addr: usize, len: usize) -> TryPin {
        let mut state = self.state.lock();
        let Some(last) = addr.checked_add(len.max(1) - 1) else {
            return TryPin::Foreign;
        };
        let (Some(first), Some(last_index)) = (state.index(addr), state.index(last)) else {
            return TryPin::Foreign;
        };
        for index in first..=last_index {
            let granule = state.granule(index);
            let from = addr.max(state.addr(index)) % GRANULE / PAGE;
            let to = last.min(state.addr(index) + GRANULE - 1) % GRANULE / PAGE;
            let usable = matches!(granule.backing, Backing::Extent(_) | Backing::Dram);
            if !usable || !granule.live.contains(from, to - from + 1) {
                return TryPin::Foreign;
            }
            if granule.in_flight {
                return TryPin::Moving;
            }
            if granule.pins == u16::MAX {
                return TryPin::TooMany;
            }
        }
        for index in first..=last_index {
            state.granule_mut(index).pins += 1;
        }
        TryPin::Pinned
    }

    /// Ends a pin of exactly this range. What was freed meanwhile goes now.
    pub(crate) fn unpin(&self, addr: usize, len: usize) {
        let mut state = self.state.lock();
        let last = addr + len.max(1) - 1;
        let (Some(first), Some(last)) = (state.index(addr), state.index(last)) else {
            return;
        };
        for index in first..=last {
            let granule = state.granule_mut(index);
            granule.pins -= 1;
            if granule.pins == 0 && granule.live.is_empty() && !granule.in_flight {
                let at = state.addr(index);
                state.emptied_in_flight(index, at);
                state.set_gap(index);
            }
        }
    }
}
