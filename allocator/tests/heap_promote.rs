//! What could not come back to extents once comes back later. One test,
//! because a process has one heap.

mod common;

use std::time::{Duration, Instant};

use allocator::space::{Backing, GRANULE};
use allocator::{Config, Heap, Placement};
use common::MemfdSource;
use rustix::mm::{mlock, munlock};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 32;
const BLOCKS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(60);

fn blocks_on_extents(blocks: &[*mut u8]) -> usize {
    let on_extent = |block: &&*mut u8| {
        matches!(
            HEAP.space().backing_of(block.addr()),
            Some(Backing::Extent(_))
        )
    };
    blocks.iter().filter(on_extent).count()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what}: {:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One refusal kept a granule in DRAM until the next recall.
#[test]
fn a_granule_that_was_locked_comes_back_when_it_is_not() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !common::moves(&HEAP) {
        return;
    }
    let blocks: Vec<*mut u8> = (0..BLOCKS)
        .map(|_| HEAP.allocate(GRANULE, 16, true))
        .collect();
    assert!(blocks.iter().all(|block| !block.is_null()));
    assert_eq!(blocks_on_extents(&blocks), BLOCKS);
    source.close(true);
    source.recall(1, (GRANULES * GRANULE) as u64);
    assert_eq!(blocks_on_extents(&blocks), 0);

    // The first that would come back.
    let locked = blocks.iter().min().unwrap().cast();
    // SAFETY: a page of a live block.
    unsafe { mlock(locked, 1) }.unwrap();
    source.close(false);
    source.restore();
    wait_for("the others", || blocks_on_extents(&blocks) >= BLOCKS - 2);
    assert!(HEAP.stats().usage.dram_live > 0);
    // SAFETY: as above.
    unsafe { munlock(locked, 1) }.unwrap();
    wait_for("the last", || blocks_on_extents(&blocks) == BLOCKS);
}
