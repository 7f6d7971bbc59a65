//! What a recall does not get, why, and that the receipt adds up: a deadline,
//! a mapping that the program changed, too little DRAM. One test, because a
//! process has one heap.

mod common;

use std::time::{Duration, Instant};

use allocator::source::{Ranges, RecallOutcome, Refusal, WindowRange};
use allocator::space::{Backing, GRANULE};
use allocator::{Config, Heap, OnExhausted, Placement};
use common::{MemfdSource, moves};
use rustix::mm::{MprotectFlags, mprotect};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 64;
/// Live granules, each one block.
const BLOCKS: usize = 32;
/// Of them, how many find room in DRAM.
const LIMIT: usize = 8;
const PAGE: usize = 4096;

fn fill() -> Vec<*mut u8> {
    let block = |number| {
        let block = HEAP.allocate(GRANULE, 16, false);
        assert!(!block.is_null());
        // SAFETY: a new block of this size.
        unsafe { block.write_bytes(number as u8, GRANULE) };
        block
    };
    (0..BLOCKS).map(block).collect()
}

fn check(blocks: &[*mut u8]) {
    for (number, block) in blocks.iter().enumerate() {
        // SAFETY: a live block of this size.
        let bytes = unsafe { std::slice::from_raw_parts(*block, GRANULE) };
        assert!(bytes.iter().all(|byte| *byte == number as u8), "{number}");
    }
}

fn extents_of(blocks: &[*mut u8]) -> Ranges {
    let mut ranges = Ranges::EMPTY;
    for block in blocks {
        let Some(Backing::Extent(offset)) = HEAP.space().backing_of(*block as usize) else {
            panic!("{block:?} is not on an extent");
        };
        assert!(ranges.push(WindowRange {
            offset,
            len: GRANULE as u64,
        }));
    }
    ranges
}

/// Waits until all blocks are on extents.
fn settle() {
    let end = Instant::now() + Duration::from_secs(5);
    while HEAP.stats().usage.extent_live < (BLOCKS * GRANULE) as u64 {
        assert!(Instant::now() < end, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
}

const fn granules(count: usize) -> u64 {
    (count * GRANULE) as u64
}

#[test]
fn what_is_refused_is_said() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        dram_limit: granules(LIMIT),
        promote: 8 << 30,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let blocks = fill();
    settle();

    // No time: what is idle comes back, and nothing is moved.
    let all = granules(GRANULES);
    let outcome = source.ask_back(1, all, Ranges::EMPTY, Duration::ZERO);
    assert_eq!(outcome.reason, Some(Refusal::Deadline), "{outcome:?}");
    assert_eq!((outcome.rebound, outcome.refused), (0, granules(BLOCKS)));
    assert_eq!(HEAP.stats().evacuated, 0);

    // One granule can't be moved, and its neighbours can.
    let some = &blocks[10..14];
    // SAFETY: a page of a live block, made accessible again below.
    let protect = |access| unsafe {
        mprotect(some[2].add(8 * PAGE).cast(), PAGE, access).unwrap();
    };
    protect(MprotectFlags::READ);
    let outcome = source.recall_ranges(2, &extents_of(some));
    let wanted = RecallOutcome {
        idle: 0,
        rebound: granules(3),
        refused: granules(1),
        reason: Some(Refusal::MappingChanged),
    };
    assert_eq!(outcome, wanted);
    protect(MprotectFlags::READ | MprotectFlags::WRITE);
    // Another recall tries again.
    let outcome = source.recall_ranges(3, &extents_of(&some[2..3]));
    assert_eq!((outcome.rebound, outcome.reason), (granules(1), None));
    source.restore();
    settle();

    // DRAM for some: the rest stays where it is.
    let outcome = source.recall(4, all);
    assert_eq!(outcome.reason, Some(Refusal::NoDram), "{outcome:?}");
    assert_eq!(outcome.rebound, granules(LIMIT), "{outcome:?}");
    assert_eq!(outcome.refused, granules(BLOCKS - LIMIT), "{outcome:?}");
    assert!(HEAP.stats().usage.dram_held <= granules(LIMIT));

    let stats = HEAP.stats();
    assert_eq!(stats.recalls, 4);
    let refused = granules(BLOCKS + 1 + BLOCKS - LIMIT);
    assert_eq!(stats.recall_refused, refused, "{stats:?}");
    assert_eq!(stats.evacuated as usize, 3 + 1 + LIMIT, "{stats:?}");
    // Every granule is with the source or with the heap, but for those on
    // their way.
    let end = Instant::now() + Duration::from_secs(5);
    let held = || HEAP.stats().usage.extent_held as usize / GRANULE;
    while source.free_granules() + held() != GRANULES {
        assert!(Instant::now() < end, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    check(&blocks);
}
