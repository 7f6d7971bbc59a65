//! A fork does not wait for what the worker is at: neither for a callback that
//! a recall has asked, which blocks, nor for the rest of that recall. One test,
//! because a process has one heap.

mod common;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use allocator::source::Ranges;
use allocator::space::GRANULE;
use allocator::{Config, Heap, OnExhausted, Placement};
use common::{MemfdSource, moves, wait_for};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 16;
/// Half of it is for callbacks.
const DEADLINE: Duration = Duration::from_secs(40);
/// A fork takes milliseconds.
const SOON: Duration = Duration::from_secs(8);
static BLOCKS: AtomicBool = AtomicBool::new(false);
static OVER: AtomicBool = AtomicBool::new(false);

fn until(what: &AtomicBool) {
    while !what.load(Relaxed) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_fork_does_not_wait_for_a_callback() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let _cache = HEAP.arena("cache").on_pressure(|_| {
        BLOCKS.store(true, Relaxed);
        until(&OVER);
    });
    let _cache = _cache.build().unwrap();
    let block = HEAP.allocate(4 * GRANULE, 64, false);
    assert!(!block.is_null());
    // SAFETY: a new block of this size.
    unsafe { block.write_bytes(7, 4 * GRANULE) };
    // It begins in DRAM, because extents are asked for in the background.
    wait_for(&HEAP, "the heap is on extents", || {
        HEAP.stats().usage.dram_live == 0
    });
    // Nothing is to come in the middle of the recall.
    source.close(true);
    let all = (GRANULES * GRANULE) as u64;
    let recall = std::thread::spawn(move || source.ask_back(1, all, Ranges::EMPTY, DEADLINE));
    until(&BLOCKS);

    let begun = Instant::now();
    // SAFETY: the child reads, and ends.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: a live block, which the child has a copy of.
        let bytes = unsafe { std::slice::from_raw_parts(block, 4 * GRANULE) };
        let same = bytes.iter().all(|byte| *byte == 7);
        // SAFETY: ends the child and runs nothing of the parent's.
        unsafe { libc::_exit(i32::from(!same)) };
    }
    let took = begun.elapsed();
    let mut status = 0;
    // SAFETY: a status of our own.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "the child has not what its parent had");
    assert!(took < SOON, "the fork waited for {took:?}");
    assert_eq!(HEAP.stats().unforked, 0);
    OVER.store(true, Relaxed);
    let outcome = recall.join().unwrap();
    assert_eq!(outcome.refused.bytes(), 0, "{outcome:?}");
    assert_eq!(source.free_granules(), GRANULES);
}
