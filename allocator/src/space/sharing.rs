//! Granules shared by a fork: the books of those whose original a source
//! keeps, for this process and for its children.
//!
//! ```text
//!  Extent ──pick_sharing, end_covering──► Original ──filled──► Dram
//!     ▲                                      │
//!     └──uncovered: not shared, or no more───┘
//!
//!  in a child:                   Original ──► Inherited ──filled──► Dram
//! ```
#![forbid(unsafe_code)]

use core::ops::Range;

use super::granule::{Backing, GRANULE, PAGE};
use super::table::State;
use super::{SharedRun, Space};

/// Granules that one placeholder covers at most.
const COVER: usize = 1024;

impl Space {
    /// The next run of granules from address `from` on that are on extents and
    /// have something live, at most `most`. It is in flight until
    /// [`Space::end_covering`].
    pub fn pick_sharing(&self, from: usize, most: usize) -> Option<Range<usize>> {
        let mut state = self.state.lock();
        let may = |state: &State, index: usize| {
            let granule = state.granule(index);
            let extent = matches!(granule.backing, Backing::Extent(_));
            extent && !granule.stays() && !granule.live.is_empty()
        };
        let start = state.index(from.max(state.addr(0)))?;
        let first = (start..state.high).find(|&index| most > 0 && may(&state, index))?;
        let mut end = first;
        while end < state.high && end - first < most.min(COVER) && may(&state, end) {
            state.granule_mut(end).in_flight = true;
            state.set_gap(end);
            end += 1;
        }
        Some(state.addr(first)..state.addr(end))
    }

    /// The first neighbours in the window of a run that is to be covered, from
    /// address `from` on.
    pub fn neighbours(&self, from: usize, end: usize) -> Option<Range<usize>> {
        let state = self.state.lock();
        let extent = |index: usize| match state.granule(index).backing {
            Backing::Extent(offset) => Some(offset),
            _ => None,
        };
        let all = state.indices(&(from..end));
        let first = all.clone().find(|&index| extent(index).is_some())?;
        let offset = extent(first)?;
        let follows =
            |&index: &usize| extent(index) == Some(offset + ((index - first) * GRANULE) as u64);
        let count = (first..all.end).take_while(follows).count();
        Some(state.addr(first)..state.addr(first + count))
    }

    /// Whether a run is covered now. It stays in flight until
    /// [`Space::end_sharing`], or is as before.
    pub fn end_covering(&self, at: Range<usize>, covered: bool) {
        let mut state = self.state.lock();
        for index in state.indices(&at) {
            let granule = state.granule_mut(index);
            match (granule.backing, covered) {
                (Backing::Extent(offset), true) => {
                    granule.backing = Backing::Original(offset);
                    granule.fate = None;
                }
                _ => state.landed(index),
            }
        }
    }

    /// The next neighbours in the window from address `from` on that were
    /// covered and are in flight still.
    pub fn next_covered(&self, from: usize) -> Option<SharedRun> {
        let state = self.state.lock();
        let original = |index: usize| match state.granule(index) {
            granule if !granule.in_flight => None,
            granule => match granule.backing {
                Backing::Original(offset) => Some(offset),
                _ => None,
            },
        };
        let start = state.index(from.max(state.addr(0)))?;
        let (first, offset) = (start..state.high).find_map(|i| Some((i, original(i)?)))?;
        let follows = |&n: &usize| {
            let at = first + n;
            at < state.high && original(at) == Some(offset + (n * GRANULE) as u64)
        };
        Some(SharedRun {
            addr: state.addr(first),
            offset,
            len: (0..).take_while(follows).count() * GRANULE,
        })
    }

    /// What was covered is shared: it may be handed out again.
    pub fn end_sharing(&self) {
        let mut state = self.state.lock();
        for index in 0..state.high {
            let granule = state.granule_mut(index);
            if granule.in_flight && matches!(granule.backing, Backing::Original(_)) {
                granule.in_flight = false;
                state.set_gap(index);
            }
        }
    }

    /// Whether anything of this process is behind a placeholder of a fork.
    pub fn has_originals(&self) -> bool {
        let state = self.state.lock();
        let original = |index| matches!(state.granule(index).backing, Backing::Original(_));
        (0..state.high).any(original)
    }

    /// What was covered is as it was before.
    pub fn uncovered(&self, run: &SharedRun) {
        let mut state = self.state.lock();
        for index in state.indices(&run.range()) {
            if let Backing::Original(offset) = state.granule(index).backing {
                state.granule_mut(index).backing = Backing::Extent(offset);
                state.landed(index);
            }
        }
    }

    /// Originals of which this process has its own copy.
    pub fn filled(&self, run: &SharedRun) {
        self.filled_if(run, |backing| matches!(backing, Backing::Original(_)));
    }

    /// The same of an ancestor's: what it left here may have become something
    /// else since, even another ancestor's.
    pub fn inherited_filled(&self, run: &SharedRun, line: u8) {
        self.filled_if(run, |backing| backing == Backing::Inherited(line));
    }

    fn filled_if(&self, run: &SharedRun, is_meant: impl Fn(Backing) -> bool) {
        let mut state = self.state.lock();
        for index in state.indices(&run.range()) {
            if is_meant(state.granule(index).backing) {
                state.filled(index);
            }
        }
    }

    /// This process has its own copies of all that an ancestor left it.
    pub fn filled_all(&self, line: u8) {
        let mut state = self.state.lock();
        for index in 0..state.high {
            if state.granule(index).backing == Backing::Inherited(line) {
                state.filled(index);
            }
        }
    }

    /// The address of the extent at `offset`, where nobody of the program is.
    pub fn alias(&self, offset: u64) -> usize {
        self.state.lock().window + offset as usize
    }
}

impl State {
    /// The granules of some addresses of this space.
    fn indices(&self, at: &Range<usize>) -> Range<usize> {
        match self.index(at.start) {
            Some(first) => first..(first + at.len() / GRANULE).min(self.high),
            None => 0..0,
        }
    }

    /// A granule has the backing that its books say.
    fn landed(&mut self, index: usize) {
        self.granule_mut(index).in_flight = false;
        // What the device took meanwhile faults when it is read.
        self.granule_mut(index).fate = None;
        // What is pinned is put off until it is not.
        if self.granule(index).live.is_empty() && self.granule(index).pins == 0 {
            self.emptied_in_flight(index, self.addr(index));
        }
        self.set_gap(index);
    }

    fn filled(&mut self, index: usize) {
        let granule = self.granule_mut(index);
        let live = u64::from(granule.live.count()) * PAGE as u64;
        match granule.backing {
            Backing::Original(_) => {
                self.usage.extent_live -= live;
                self.usage.extent_held -= GRANULE as u64;
            }
            Backing::Inherited(_) => self.usage.inherited -= live,
            _ => return,
        }
        self.granule_mut(index).backing = Backing::Dram;
        self.count_in(Backing::Dram, live);
        self.usage.note_peaks();
        self.landed(index);
    }

    /// In a child: what its parent shared comes when it is touched. Returns
    /// the bytes that are live there.
    pub(super) fn inherit_originals(&mut self, line: u8) -> u64 {
        let mut live = 0;
        for index in 0..self.high {
            let granule = self.granule_mut(index);
            if matches!(granule.backing, Backing::Original(_)) {
                granule.backing = Backing::Inherited(line);
                self.landed(index);
            }
            let granule = self.granule(index);
            if matches!(granule.backing, Backing::Inherited(_)) {
                live += u64::from(granule.live.count()) * PAGE as u64;
            }
        }
        live
    }
}
