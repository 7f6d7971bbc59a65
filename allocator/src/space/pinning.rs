//! Pins: granules that stay where they are, because a device writes to them.
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;

use super::Space;
use super::granule::{Backing, GRANULE, PAGE};
use super::table::State;

/// What came of an attempt to pin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TryPin {
    Pinned(Pinned),
    /// The granule at this address is on the move, or in the file.
    Away(usize),
    /// Some of it is not in use, lost, or not of this space.
    Foreign,
    /// A granule has [`MAX_PINS`].
    TooMany,
}

/// A range that is pinned; to be given to [`Space::unpin`] once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Pinned {
    addr: usize,
    len: usize,
    /// A fork voids the pins of the child.
    epoch: u32,
}

/// Pins that one granule may have.
pub const MAX_PINS: u16 = u16::MAX;

impl Space {
    /// Pins the granules that `len` bytes at `addr` lie in; all or none.
    pub(crate) fn try_pin(&self, addr: usize, len: usize) -> TryPin {
        let mut state = self.state.lock();
        let last = addr.checked_add(len.saturating_sub(1));
        let (Some(first_index), Some(last), Some(last_index)) = (
            state.index(addr),
            last,
            last.and_then(|last| state.index(last)),
        ) else {
            return TryPin::Foreign;
        };
        let mut away = None;
        for index in first_index..=last_index {
            let (at, granule) = (state.addr(index), state.granule(index));
            let from = (addr.max(at) - at) / PAGE;
            let to = (last.min(at + GRANULE - 1) - at) / PAGE;
            let gone = matches!(granule.backing, Backing::None | Backing::Lost);
            if gone || !granule.live.contains(from, to - from + 1) {
                return TryPin::Foreign;
            }
            if granule.pins == MAX_PINS {
                return TryPin::TooMany;
            }
            if granule.in_flight || granule.backing == Backing::Spilled {
                away = away.or(Some(at));
            }
        }
        if let Some(at) = away {
            return TryPin::Away(at);
        }
        for index in first_index..=last_index {
            state.granule_mut(index).pins += 1;
        }
        let epoch = self.pin_epoch.load(Ordering::Relaxed);
        TryPin::Pinned(Pinned { addr, len, epoch })
    }

    /// Ends a pin. What was freed meanwhile goes now.
    pub(crate) fn unpin(&self, pinned: Pinned) {
        let mut state = self.state.lock();
        if pinned.epoch != self.pin_epoch.load(Ordering::Relaxed) {
            return;
        }
        let last = pinned.addr + (pinned.len - 1);
        if let (Some(first), Some(last)) = (state.index(pinned.addr), state.index(last)) {
            for index in first..=last {
                let pins = state.granule(index).pins;
                debug_assert!(pins > 0, "a pin that is not booked");
                if pins > 0 {
                    state.set_pins(index, pins - 1);
                }
            }
        }
    }

    /// Voids all pins: in a child, whose pages are no device's.
    pub(super) fn unpin_all(&self, state: &mut State) {
        self.pin_epoch.fetch_add(1, Ordering::Relaxed);
        for index in 0..state.high {
            if state.granule(index).pins > 0 {
                state.set_pins(index, 0);
            }
        }
    }

    /// Bytes of granules that are pinned.
    pub(crate) fn pinned_bytes(&self) -> u64 {
        let state = self.state.lock();
        let pinned = (0..state.high).filter(|&index| state.granule(index).pins > 0);
        (pinned.count() * GRANULE) as u64
    }
}

impl State {
    fn set_pins(&mut self, index: usize, pins: u16) {
        let granule = self.granule_mut(index);
        granule.pins = pins;
        if pins == 0 && granule.live.is_empty() && !granule.in_flight {
            let at = self.addr(index);
            self.emptied_in_flight(index, at);
            self.set_gap(index);
        }
    }
}
