//! What a recall does not get, why, and that the receipt adds up: a deadline,
//! a mapping that the program changed, too little DRAM. One test, because a
//! process has one heap.

mod common;

use std::time::{Duration, Instant};

use allocator::source::{Ranges, Refusal, WindowRange};
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

/// Stops the source, and says what it has lent when nothing is on its way.
fn lent_for_good(source: &MemfdSource) -> u64 {
    source.close(true);
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        let held = HEAP.stats().usage.extent_held;
        if source.free_granules() as u64 * GRANULE as u64 + held == granules(GRANULES) {
            return held;
        }
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
    let late = outcome.refused.of(Refusal::Deadline);
    assert_eq!(
        (outcome.moved(), late),
        (0, granules(BLOCKS)),
        "{outcome:?}"
    );
    assert_eq!(outcome.refused.bytes(), late);
    assert_eq!(HEAP.stats().evacuated, 0);

    // One granule can't be moved, and its neighbours can.
    let some = &blocks[10..14];
    // SAFETY: a page of a live block, made accessible again below.
    let protect = |block: *mut u8, access| unsafe {
        mprotect(block.add(8 * PAGE).cast(), PAGE, access).unwrap();
    };
    let accessible = MprotectFlags::READ | MprotectFlags::WRITE;
    protect(some[2], MprotectFlags::READ);
    let outcome = source.recall_ranges(2, &extents_of(some));
    assert_eq!(outcome.moved(), granules(3), "{outcome:?}");
    assert_eq!(outcome.copied, granules(3), "{outcome:?}");
    assert_eq!(outcome.returned(), granules(3), "{outcome:?}");
    let refused: Vec<_> = outcome.refused.iter().collect();
    assert_eq!(refused.len(), 1, "{outcome:?}");
    assert_eq!(refused[0].reason, Refusal::MappingChanged);
    assert_eq!(
        refused[0].ranges.as_slice(),
        extents_of(&some[2..3]).as_slice()
    );
    protect(some[2], accessible);
    // Another recall tries again.
    let outcome = source.recall_ranges(3, &extents_of(&some[2..3]));
    assert_eq!((outcome.moved(), outcome.refused.bytes()), (granules(1), 0));
    source.restore();
    settle();

    // DRAM for some, and one that can't be moved: the rest stays where it is,
    // and each for its own reason.
    protect(blocks[0], MprotectFlags::READ);
    let lent = lent_for_good(source);
    let outcome = source.recall(4, all);
    protect(blocks[0], accessible);
    source.close(false);
    source.restore();
    let refused = |reason| outcome.refused.of(reason);
    assert_eq!(outcome.to_dram, granules(LIMIT), "{outcome:?}");
    assert_eq!(refused(Refusal::MappingChanged), granules(1), "{outcome:?}");
    assert_eq!(
        refused(Refusal::NoDram),
        granules(BLOCKS - LIMIT - 1),
        "{outcome:?}"
    );
    assert_eq!(outcome.returned() + outcome.refused.bytes(), lent);
    assert!(outcome.moving > Duration::ZERO, "{outcome:?}");
    assert!(HEAP.stats().usage.dram_held <= granules(LIMIT));

    let stats = HEAP.stats();
    assert_eq!(stats.recalls, 4);
    let refused = granules(BLOCKS + 1 + BLOCKS - LIMIT);
    assert_eq!(stats.recall_refused, refused, "{stats:?}");
    assert_eq!(stats.evacuated as usize, 3 + 1 + LIMIT, "{stats:?}");

    // No time, but the work goes on after it: two answers, of which the second
    // has what the first had not.
    settle();
    let lent = lent_for_good(source);
    let [first, last] = source.recall_past_deadline(5, all);
    assert!(first.more && !last.more, "{first:?} {last:?}");
    let late = first.refused.of(Refusal::Deadline);
    assert_eq!((first.moved(), late), (0, granules(BLOCKS)), "{first:?}");
    assert_eq!(last.to_dram, granules(LIMIT), "{last:?}");
    assert_eq!(last.refused.of(Refusal::Deadline), 0, "{last:?}");
    let refused = last.refused.of(Refusal::NoDram);
    assert_eq!(refused, granules(BLOCKS - LIMIT), "{last:?}");
    assert_eq!(first.returned() + last.returned() + refused, lent);
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
