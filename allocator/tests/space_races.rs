//! Allocate, free, lend, recall, move, spill and restore in any order. Every
//! step of a space is one critical section, so an order of steps is all that
//! threads can make of them; a move is two steps, and anything may lie between.
//!
//! No content is moved and no memory touched: these are the books.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use allocator::source::{ExtentSource, Ranges, Refusal, WindowRange};
use allocator::space::rebind::RUN;
use allocator::space::{Backing, GRANULE, Leaving, Move, PAGE, Space, Tier};
use common::MemfdSource;
use proptest::prelude::*;

const WINDOW: usize = 12;

#[derive(Clone, Debug)]
enum Step {
    Allocate {
        pages: usize,
        dram: bool,
    },
    Free {
        which: usize,
    },
    Lend {
        first: usize,
        count: usize,
    },
    TakeIdle {
        count: usize,
        from: usize,
        len: usize,
    },
    Leave {
        count: usize,
        from: usize,
        len: usize,
        dram: usize,
        spill: usize,
    },
    Return {
        count: usize,
    },
    Restore {
        which: usize,
    },
    End {
        which: usize,
        stayed: u8,
    },
    Sweep,
}

fn step() -> impl Strategy<Value = Step> {
    let at = 0..WINDOW;
    prop_oneof![
        6 => (1usize..1400, any::<bool>()).prop_map(|(pages, dram)| Step::Allocate { pages, dram }),
        5 => any::<usize>().prop_map(|which| Step::Free { which }),
        2 => (at.clone(), 1..WINDOW).prop_map(|(first, count)| Step::Lend { first, count }),
        2 => (1..WINDOW, at.clone(), 0..WINDOW)
            .prop_map(|(count, from, len)| Step::TakeIdle { count, from, len }),
        4 => (1..WINDOW, at, 0..WINDOW, 0usize..4, 0usize..2000).prop_map(
            |(count, from, len, dram, spill)| Step::Leave { count, from, len, dram, spill }
        ),
        1 => (1..WINDOW).prop_map(|count| Step::Return { count }),
        2 => any::<usize>().prop_map(|which| Step::Restore { which }),
        5 => (any::<usize>(), any::<u8>()).prop_map(|(which, stayed)| Step::End { which, stayed }),
        1 => Just(Step::Sweep),
    ]
}

/// What a space should hold.
struct Books {
    space: &'static Space,
    /// Runs that were handed out: address and bytes.
    runs: BTreeMap<usize, usize>,
    /// Extents that the space has.
    lent: BTreeSet<u64>,
    moves: Vec<Move>,
}

impl Books {
    fn new() -> Self {
        let (window, len) = MemfdSource::leak(WINDOW).window();
        let space = Box::leak(Box::new(Space::new()));
        space.open().unwrap();
        // SAFETY: a window that stays for ever and that nobody else uses.
        unsafe { space.open_window(window, len) }.unwrap();
        Self {
            space,
            runs: BTreeMap::new(),
            lent: BTreeSet::new(),
            moves: Vec::new(),
        }
    }

    /// Extents leave the space: each once, and only those that it had.
    fn gone(&mut self, ranges: &Ranges) {
        for range in ranges.as_slice() {
            for offset in (range.offset..range.offset + range.len).step_by(GRANULE) {
                assert!(self.lent.remove(&offset), "{offset:#x} was not the space's");
            }
        }
    }

    fn wanted(from: usize, len: usize) -> Vec<WindowRange> {
        let range = WindowRange {
            offset: (from * GRANULE) as u64,
            len: (len * GRANULE) as u64,
        };
        (len > 0).then_some(range).into_iter().collect()
    }

    fn end(&mut self, which: usize, bits: u8) {
        let moved = self.moves.swap_remove(which % self.moves.len());
        let stayed: [_; RUN] =
            core::array::from_fn(|i| (bits >> i & 1 == 1).then_some(Refusal::CannotMove));
        let freed = self.space.end_move(moved, &stayed).freed;
        self.gone(&freed);
    }

    fn spilled(&self) -> Vec<usize> {
        let granules = self.space.range().step_by(GRANULE).take(64);
        let is_spilled = |at: &usize| self.space.backing_of(*at) == Some(Backing::Spilled);
        granules.filter(is_spilled).collect()
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Allocate { pages, dram } => {
                let len = pages * PAGE;
                if let Some(run) = self.space.alloc(Tier::Extent, len, PAGE, dram) {
                    let before = self.runs.range(..run.addr + len).next_back();
                    let apart = before.is_none_or(|(at, len)| at + len <= run.addr);
                    assert!(apart, "{:#x}+{len:#x} was handed out before", run.addr);
                    self.runs.insert(run.addr, len);
                }
            }
            Step::Free { which } => {
                let at = self
                    .runs
                    .keys()
                    .copied()
                    .nth(which % self.runs.len().max(1));
                if let Some(at) = at {
                    let len = self.runs.remove(&at).unwrap();
                    self.space.free(at, len);
                }
            }
            Step::Lend { first, count } => {
                for index in first..(first + count).min(WINDOW) {
                    let offset = (index * GRANULE) as u64;
                    if self.lent.insert(offset) {
                        let mut ranges = Ranges::EMPTY;
                        let len = GRANULE as u64;
                        ranges.push(WindowRange { offset, len });
                        assert_eq!(self.space.lend(&ranges), len);
                    }
                }
            }
            Step::TakeIdle { count, from, len } => {
                let ranges = self.space.take_idle(count, &Self::wanted(from, len), 0);
                assert!(ranges.bytes() <= (count * GRANULE) as u64);
                self.gone(&ranges);
            }
            Step::Leave {
                count,
                from,
                len,
                dram,
                spill,
            } => {
                let picked = self.space.pick_leaving(Leaving {
                    wanted: &Self::wanted(from, len),
                    granules: count,
                    to_extents: spill % 2 == 0,
                    dram: (dram * GRANULE) as u64,
                    spill: (spill * PAGE) as u64,
                });
                self.moves.extend(picked);
                self.space.forgive();
            }
            Step::Return { count } => self.moves.extend(self.space.pick_returning(count)),
            Step::Restore { which } => {
                let spilled = self.spilled();
                // One move at a time of each, as its owner sees to.
                if !spilled.is_empty() && self.moves.is_empty() {
                    let at = spilled[which % spilled.len()];
                    let picked = self.space.pick_restoring(at, which % 2 == 0);
                    self.moves.extend(picked);
                    self.end(0, 0);
                }
            }
            Step::End { which, stayed } if !self.moves.is_empty() => self.end(which, stayed),
            Step::End { .. } => {}
            Step::Sweep => self.space.sweep_spilled(|_, pages, bare| {
                assert!(bare || pages.count() > 0);
            }),
        }
    }

    /// The sums agree, and no extent is behind two granules.
    fn check(&self) {
        let usage = self.space.usage();
        let live: usize = self.runs.values().sum();
        let booked = usage.extent_live + usage.dram_live + usage.spilled;
        assert_eq!(booked, live as u64, "{usage:?}");
        assert_eq!(
            usage.extent_held,
            (self.lent.len() * GRANULE) as u64,
            "{usage:?}"
        );
        assert!(usage.idle <= usage.extent_held, "{usage:?}");
        assert_eq!(usage.spilled_held, (self.spilled().len() * GRANULE) as u64);
        let mut seen = BTreeSet::new();
        for at in self.space.range().step_by(GRANULE).take(64) {
            if let Some(Backing::Extent(offset)) = self.space.backing_of(at) {
                assert!(
                    self.lent.contains(&offset),
                    "{offset:#x} is not the space's"
                );
                assert!(seen.insert(offset), "{offset:#x} is behind two granules");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_page_is_handed_out_twice_and_no_extent_is_lost(
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut books = Books::new();
        for step in &steps {
            books.take(step);
            books.check();
        }
        // In the end everything can be given back.
        while !books.moves.is_empty() {
            books.end(0, 0);
        }
        for (at, len) in core::mem::take(&mut books.runs) {
            books.space.free(at, len);
        }
        books.space.sweep_spilled(|_, _, _| ());
        loop {
            let ranges = books.space.take_idle(usize::MAX, &[], 0);
            if ranges.is_empty() {
                break;
            }
            books.gone(&ranges);
        }
        books.check();
        prop_assert!(books.lent.is_empty(), "{:?} are held by nothing", books.lent);
        prop_assert_eq!(books.space.usage().dram_held, 0);
    }
}
