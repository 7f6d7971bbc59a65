//! DRAM is short: what is there for want of extents goes to extents at once,
//! where it would take its time otherwise, and freed pages go. One test,
//! because a process has one heap.

mod common;

use std::time::{Duration, Instant};

use allocator::source::Event;
use allocator::space::GRANULE;
use allocator::{Config, Heap, OnExhausted, Placement};
use common::{MemfdSource, moves};

static HEAP: Heap = Heap::new();
const BLOCKS: usize = 24;
const ALL: u64 = (BLOCKS * GRANULE) as u64;

fn wait_for(what: &str, done: impl Fn() -> bool) -> Duration {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "{what}: {:?}",
            HEAP.stats()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    start.elapsed()
}

/// Recalls everything to DRAM, has it come back, and says how long that took.
fn there_and_back(source: &MemfdSource, id: u64, strained: bool) -> Duration {
    source.close(true);
    let outcome = source.recall(id, 64 * GRANULE as u64);
    assert_eq!(outcome.to_dram, ALL, "{outcome:?}");
    source.close(false);
    source.restore();
    if strained {
        source.send(Event::DramShort);
    }
    wait_for("back on extents", || HEAP.stats().usage.extent_live >= ALL)
}

#[test]
fn what_is_in_dram_for_want_of_extents_goes_to_some_at_once() {
    let source = MemfdSource::leak(64);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        // A granule in each tick of 50 ms.
        promote: 1 << 10,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let fill = |number: usize| {
        let block = HEAP.allocate(GRANULE, 16, false);
        // SAFETY: a new block of this size.
        unsafe { block.write_bytes(number as u8, GRANULE) };
        block
    };
    let blocks: Vec<*mut u8> = (0..BLOCKS).map(fill).collect();
    wait_for("all on extents", || HEAP.stats().usage.extent_live >= ALL);
    let at_leisure = there_and_back(source, 1, false);
    let in_haste = there_and_back(source, 2, true);
    println!("{at_leisure:?} at leisure, {in_haste:?} under pressure");
    assert!(at_leisure > in_haste * 2, "{at_leisure:?}, {in_haste:?}");
    for (number, block) in blocks.iter().enumerate() {
        // SAFETY: a live block of this size.
        let bytes = unsafe { std::slice::from_raw_parts(*block, GRANULE) };
        assert!(bytes.iter().all(|byte| *byte == number as u8), "{number}");
    }
}
