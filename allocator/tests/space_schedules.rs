//! A space between threads whose every order shuttle chooses: two that
//! allocate and free, one that lends and recalls what is unused, one that
//! moves what is in use, and one that forks. `space_races` tries steps one
//! after the other; here each thread has a course of its own, and any number
//! of the others' steps lie between two of it.
//!
//! No content is moved and no memory touched: these are the books.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use allocator::source::{ExtentSource, Ranges, Refusal, WindowRange};
use allocator::space::rebind::RUN;
use allocator::space::{Backing, GRANULE, Leaving, PAGE, Space, Tier};
use common::MemfdSource;
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;

const WINDOW: usize = 8;
const STEPS: usize = 30;
const ORDERS: usize = 200;

/// What the threads know together. The mutex is never held over a step of the
/// space, nor waited for: shuttle's threads run one at a time.
#[derive(Default)]
struct Known {
    /// Runs that were handed out: address and bytes.
    runs: BTreeMap<usize, usize>,
    /// Extents that the space has.
    lent: BTreeSet<u64>,
}

impl Known {
    fn hand_out(&mut self, at: usize, len: usize) {
        let before = self.runs.range(..at + len).next_back();
        let apart = before.is_none_or(|(at_before, len)| at_before + len <= at);
        assert!(apart, "{at:#x}+{len:#x} was handed out before");
        self.runs.insert(at, len);
    }

    /// Those that lie, in part at least, in a range.
    fn runs_in(&self, range: Range<usize>) -> Vec<usize> {
        let before_end = self.runs.range(..range.end);
        let reach_in = before_end.filter(|&(at, len)| at + len > range.start);
        reach_in.map(|(at, _)| *at).collect()
    }

    fn gone(&mut self, ranges: &Ranges) {
        for range in ranges.as_slice() {
            for offset in (range.offset..range.offset + range.len).step_by(GRANULE) {
                assert!(self.lent.remove(&offset), "{offset:#x} was not the space's");
            }
        }
    }
}

type Shared = Arc<Mutex<Known>>;

fn extent(index: usize) -> Ranges {
    let mut ranges = Ranges::EMPTY;
    ranges.push(WindowRange {
        offset: (index * GRANULE) as u64,
        len: GRANULE as u64,
    });
    ranges
}

/// Allocates, holds some, frees.
fn program(space: &'static Space, known: &Shared) {
    let mut mine = Vec::new();
    for _ in 0..STEPS {
        let len = thread_rng().gen_range(1..1600) * PAGE;
        let dram = thread_rng().gen_bool(0.5);
        if let Some(run) = space.alloc(Tier::Extent, len, PAGE, dram) {
            known.lock().unwrap().hand_out(run.addr, len);
            assert!(
                space.owner_of(run.addr).is_some(),
                "handed out, and nobody's"
            );
            mine.push((run.addr, len));
        }
        thread::yield_now();
        if mine.len() > 1 {
            let (at, len) = mine.swap_remove(thread_rng().gen_range(0..mine.len()));
            known.lock().unwrap().runs.remove(&at);
            space.free(at, len);
            thread::yield_now();
        }
    }
    for (at, len) in mine {
        known.lock().unwrap().runs.remove(&at);
        space.free(at, len);
        thread::yield_now();
    }
}

/// Lends, and takes back what is unused.
fn lender(space: &'static Space, known: &Shared) {
    for _ in 0..STEPS {
        let index = thread_rng().gen_range(0..WINDOW);
        let new = known.lock().unwrap().lent.insert((index * GRANULE) as u64);
        if new {
            assert_eq!(space.lend(&extent(index)), GRANULE as u64);
        }
        thread::yield_now();
        let wanted = extent(thread_rng().gen_range(0..WINDOW));
        let any = thread_rng().gen_bool(0.5);
        let wanted = if any { &[] } else { wanted.as_slice() };
        let back = space.take_idle(2, wanted, 0);
        known.lock().unwrap().gone(&back);
        thread::yield_now();
    }
}

/// Moves what is in use: to other extents, to DRAM, and back. Between the two
/// steps of a move its granules are nobody else's to move or to give back.
fn mover(space: &'static Space, known: &Shared) {
    for round in 0..STEPS {
        let wanted = extent(thread_rng().gen_range(0..WINDOW));
        let picked = match round % 3 {
            0 => space.pick_returning(RUN),
            _ => space.pick_leaving(Leaving {
                wanted: wanted.as_slice(),
                granules: RUN,
                to_extents: thread_rng().gen_bool(0.5),
                dram: thread_rng().gen_range(0..4) * GRANULE as u64,
                spill: 0,
            }),
        };
        if let Some(picked) = picked {
            let moving = picked.addr()..picked.addr() + picked.granules() * GRANULE;
            let copied = known.lock().unwrap().runs_in(moving.clone());
            thread::yield_now();
            // What is live was noted when it was picked, and no more is copied.
            for run in known.lock().unwrap().runs_in(moving) {
                assert!(copied.contains(&run), "{run:#x} was handed out on the move");
            }
            let bits: u8 = thread_rng().gen_range(0..4);
            let stayed: [_; RUN] =
                core::array::from_fn(|i| (bits >> i & 1 == 1).then_some(Refusal::CannotMove));
            let freed = space.end_move(picked, &stayed).freed;
            known.lock().unwrap().gone(&freed);
            thread::yield_now();
        }
        space.forgive();
    }
}

/// What a fork does to the parent's books: no extent takes anything in while
/// the child is made.
fn forker(space: &'static Space) {
    for _ in 0..3 {
        space.set_extents_closed(true);
        thread::yield_now();
        space.before_fork();
        // SAFETY: this thread locked it, and runs alone.
        unsafe { space.after_fork() };
        space.set_extents_closed(false);
        thread::yield_now();
    }
}

fn check(space: &Space, known: &Known) {
    let usage = space.usage();
    let live: usize = known.runs.values().sum();
    assert_eq!(
        usage.extent_live + usage.dram_live,
        live as u64,
        "{usage:?}"
    );
    let held = (known.lent.len() * GRANULE) as u64;
    assert_eq!(usage.extent_held, held, "{usage:?}");
    let mut seen = BTreeSet::new();
    for at in space.range().step_by(GRANULE).take(64) {
        if let Some(Backing::Extent(offset)) = space.backing_of(at) {
            assert!(
                known.lent.contains(&offset),
                "{offset:#x} is not the space's"
            );
            assert!(seen.insert(offset), "{offset:#x} is behind two granules");
        }
    }
}

fn one_course() {
    let (window, len) = MemfdSource::leak(WINDOW).window();
    let space: &'static Space = Box::leak(Box::new(Space::new()));
    space.open().unwrap();
    // SAFETY: a window that stays for ever and that nobody else uses.
    unsafe { space.open_window(window, len) }.unwrap();
    let known = Shared::default();
    let mut threads = Vec::new();
    for course in [program, program, lender, mover] {
        let known = Arc::clone(&known);
        threads.push(thread::spawn(move || course(space, &known)));
    }
    threads.push(thread::spawn(move || forker(space)));
    for thread in threads {
        thread.join().unwrap();
    }
    let mut known = known.lock().unwrap();
    check(space, &known);
    // In the end everything can be given back.
    loop {
        let ranges = space.take_idle(usize::MAX, &[], 0);
        if ranges.is_empty() {
            break;
        }
        known.gone(&ranges);
    }
    assert!(
        known.lent.is_empty(),
        "{:?} are held by nothing",
        known.lent
    );
    assert_eq!(space.usage().dram_held, 0);
}

#[test]
fn threads_share_a_space_in_any_order() {
    shuttle::check_random(one_course, ORDERS);
    // A few well-placed switches find what many random ones do not.
    shuttle::check_pct(one_course, ORDERS, 3);
}
