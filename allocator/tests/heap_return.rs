//! What nothing uses goes back by itself, and not before the time that is set
//! for it. One test, because a process has one heap.

mod common;

use std::time::{Duration, Instant};

use allocator::space::GRANULE;
use allocator::{Config, Heap, OnExhausted, Placement};
use common::MemfdSource;

static HEAP: Heap = Heap::new();
const GRANULES: usize = 64;
const BLOCKS: usize = 24;
const AFTER: Duration = Duration::from_millis(1000);
/// The clock by which granules age.
const TICK: Duration = Duration::from_millis(50);

#[test]
fn unused_granules_go_back_after_the_time_that_is_set() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        return_after_ms: AFTER.as_millis() as u32,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    let blocks: Vec<*mut u8> = (0..BLOCKS)
        .map(|_| HEAP.allocate(GRANULE, 16, false))
        .collect();
    assert!(blocks.iter().all(|block| !block.is_null()));
    let before = Instant::now();
    for block in blocks {
        // SAFETY: a live block, not used again.
        unsafe { allocator::engine::free(block) };
    }
    let held = || HEAP.stats().usage.extent_held;
    let freed = held();
    assert!(freed >= (BLOCKS * GRANULE) as u64);
    // First the reserve that was there for more, perhaps; of what was freed,
    // nothing.
    while held() > (BLOCKS * GRANULE) as u64 / 2 {
        assert!(before.elapsed() < 30 * AFTER, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    let kept = before.elapsed();
    println!("kept for {kept:?}");
    assert!(kept + 2 * TICK >= AFTER, "went back after {kept:?}");
    // But for those on their way.
    let all = (GRANULES * GRANULE) as u64;
    while source.free_granules() as u64 * GRANULE as u64 + held() != all {
        assert!(before.elapsed() < 60 * AFTER, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
}
