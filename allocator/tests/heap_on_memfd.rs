//! A heap with everything on extents, over a memfd: what it takes, keeps and
//! gives back. One test, because a process has one heap.

mod common;

use std::time::{Duration, Instant};

use allocator::space::{Backing, GRANULE};
use allocator::{Config, Heap, OnExhausted, Placement};
use common::MemfdSource;

static HEAP: Heap = Heap::new();
const GRANULES: usize = 64;
const MIB: usize = 1 << 20;

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{what}: {:?}",
            HEAP.stats()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Blocks of `size` bytes, each filled with its own number.
fn fill(count: usize, size: usize) -> Vec<*mut u8> {
    (0..count)
        .map(|number| {
            let block = HEAP.allocate(size, 16, false);
            assert!(!block.is_null());
            assert_eq!(block as usize % 16, 0);
            // SAFETY: a new block of `size` bytes.
            unsafe { block.write_bytes(number as u8, size) };
            block
        })
        .collect()
}

fn check_and_free(blocks: impl IntoIterator<Item = (usize, *mut u8)>, size: usize) {
    for (number, block) in blocks {
        // SAFETY: a block of `fill`, still live.
        let bytes = unsafe { std::slice::from_raw_parts(block, size) };
        assert!(
            bytes.iter().all(|byte| *byte == number as u8),
            "block {number} changed"
        );
        // SAFETY: live, and not used again.
        unsafe { allocator::engine::free(block) };
    }
}

#[test]
fn life_of_a_heap() {
    let config = Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        decay_ms: 50,
        return_after_ms: 100,
        ..Config::DEFAULT
    };
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(config));
    HEAP.attach(source).unwrap();

    // Small and large blocks land on extents, all but what came before.
    let small = fill(40_000, 1024);
    let large = fill(20, 3 * MIB / 2);
    let stats = HEAP.stats();
    assert!(stats.usage.extent_live > 68 * MIB as u64, "{stats:?}");
    assert_eq!(stats.usage.dram_held, 0, "{stats:?}");
    assert!(stats.extent_share_at_peak() >= 9_900, "{stats:?}");

    // What looks like a buffer for direct I/O is in DRAM, and only that.
    for (size, align, dram) in [(65536, 512, true), (65536, 64, false), (2048, 512, false)] {
        let block = HEAP.allocate(size, align, false);
        let backing = HEAP.space().backing_of(block as usize);
        assert_eq!(
            backing == Some(Backing::Dram),
            dram,
            "{size} aligned to {align}"
        );
        // SAFETY: live, and not used again.
        unsafe { allocator::engine::free(block) };
    }

    // What is freed goes back, without help and while the rest stays intact.
    let held = stats.usage.extent_held;
    check_and_free(large.into_iter().enumerate(), 3 * MIB / 2);
    wait_for("freed large blocks go back", || {
        HEAP.stats().usage.extent_held + 28 * MIB as u64 <= held
    });
    let (keep, drop): (Vec<_>, Vec<_>) = small
        .into_iter()
        .enumerate()
        .partition(|(n, _)| *n >= 36_000);
    check_and_free(drop, 1024);
    wait_for("90 % freed: at least 80 % goes back", || {
        HEAP.stats().usage.extent_held <= (40 * MIB / 5) as u64
    });
    wait_for("every granule is with the source or with the heap", || {
        source.free_granules() * GRANULE + HEAP.stats().usage.extent_held as usize
            == GRANULES * GRANULE
    });

    // calloc promises zeroes on granules that were used, and on returned ones.
    for size in [64, 4096, 5 * MIB] {
        let block = HEAP.allocate(size, 16, true);
        // SAFETY: a new block of `size` bytes.
        let bytes = unsafe { std::slice::from_raw_parts(block, size) };
        assert!(bytes.iter().all(|byte| *byte == 0));
        // SAFETY: live, and not used again.
        unsafe { allocator::engine::free(block) };
    }

    // A recall takes what is unused and says what is not.
    let before = HEAP.stats().usage.extent_live;
    let outcome = source.recall(1, (GRANULES * GRANULE) as u64);
    let usage = HEAP.stats().usage;
    assert!(usage.extent_live <= before);
    assert_eq!(
        usage.extent_held - usage.idle,
        outcome.refused.bytes(),
        "{outcome:?}"
    );
    check_and_free(keep, 1024);

    // No capacity: DRAM, and it is counted; capacity again: extents.
    source.close(true);
    let blocks = fill(10, 4 * MIB);
    let stats = HEAP.stats();
    assert!(
        stats.exhausted > 0 && stats.usage.dram_live >= 30 * MIB as u64,
        "{stats:?}"
    );
    source.close(false);
    source.send(allocator::source::Event::CapacityAvailable);
    wait_for("capacity is noticed", || !HEAP.space().is_exhausted());
    let more = fill(10, 4 * MIB);
    assert!(HEAP.stats().usage.extent_live >= 40 * MIB as u64);
    check_and_free(blocks.into_iter().enumerate(), 4 * MIB);
    check_and_free(more.into_iter().enumerate(), 4 * MIB);

    // Requests that can't be met fail, at once.
    let start = Instant::now();
    for size in [usize::MAX, isize::MAX as usize, 1 << 46] {
        assert!(HEAP.allocate(size, 16, false).is_null(), "{size:#x}");
    }
    assert!(start.elapsed() < Duration::from_secs(1));
    wait_for("all but a reserve goes back", || {
        HEAP.stats().usage.extent_held <= 6 * MIB as u64
    });
}
