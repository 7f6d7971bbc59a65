//! A random nine in ten of many small objects are freed, so that hardly a
//! granule is empty and hardly one is full; then all extents are recalled.
//! What comes back is all of it, for little more DRAM than the pages that are
//! live. One test, because a process has one heap.

mod common;

use std::time::Instant;

use allocator::space::{GRANULE, PAGE};
use allocator::{Config, Heap, OnExhausted, Placement, engine};
use common::{MemfdSource, Random, moves};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 288;
const OBJECTS: usize = 512 << 10;
const SIZE: usize = 1 << 10;

/// Bytes of this process in anonymous memory (`RssAnon` in proc_pid_status(5)).
fn rss_anon() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        << 10
}

#[test]
fn a_recall_of_scattered_objects_copies_what_is_live() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        decay_ms: 20,
        // Nothing comes back while it is counted.
        promote: 0,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let mut objects = Vec::with_capacity(OBJECTS);
    for number in 0..OBJECTS {
        let object = HEAP.allocate(SIZE, 16, false);
        assert!(!object.is_null());
        // SAFETY: a new object of this size.
        unsafe { object.write_bytes(number as u8, SIZE) };
        objects.push((object, number as u8));
    }
    let mut random = Random(90);
    objects.retain(|&(object, _)| {
        let keep = random.below(10) == 0;
        if !keep {
            // SAFETY: live, and not used again.
            unsafe { engine::free(object) };
        }
        keep
    });
    let mut pages: Vec<_> = objects.iter().map(|o| o.0 as usize / PAGE).collect();
    pages.sort_unstable();
    pages.dedup();
    let live = (pages.len() * PAGE) as u64;

    let before = (HEAP.stats(), rss_anon());
    let start = Instant::now();
    let outcome = source.recall(1, (GRANULES * GRANULE) as u64);
    let (took, after) = (start.elapsed(), (HEAP.stats(), rss_anon()));

    let (stats, grown) = (after.0, after.1.saturating_sub(before.1));
    println!(
        "{} objects on {} pages; {:?}: {outcome:?}; {} granules moved, DRAM grew by {:.2} \
         of what is live",
        objects.len(),
        pages.len(),
        took,
        stats.evacuated,
        grown as f64 / live as f64,
    );
    assert!(before.0.usage.extent_live >= live, "{:?}", before.0);
    assert_eq!(outcome.refused.bytes(), 0);
    assert_eq!(source.free_granules(), GRANULES, "{stats:?}");
    assert_eq!((stats.usage.extent_held, stats.usage.extent_live), (0, 0));
    // Otherwise the measure is wrong, which the kernel rounds a little.
    assert!(grown >= live * 9 / 10, "{grown} for {live}");
    assert!(grown <= live * 13 / 10, "{grown} for {live}: {stats:?}");
    assert!(stats.usage.dram_live <= live * 13 / 10, "{stats:?}");
    for (object, number) in objects {
        // SAFETY: a live object of this size, not used after it is freed.
        unsafe {
            let bytes = std::slice::from_raw_parts(object, SIZE);
            assert!(bytes.iter().all(|byte| *byte == number));
            engine::free(object);
        }
    }
}
