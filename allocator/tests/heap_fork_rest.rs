//! What a fork moved to DRAM is on extents again soon: after some times as long
//! as moving it took, and without the program's help. Who forks now and then
//! has a small heap on extents nearly all the time. One test, because a process
//! has one heap.

mod common;

use std::time::{Duration, Instant};

use allocator::source::{Ranges, WindowRange};
use allocator::space::GRANULE;
use allocator::{Config, Heap, OnExhausted, Placement};
use common::{MemfdSource, moves, wait_for};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 16;
const LIVE: usize = 4 * GRANULE;
const FORKS: usize = 11;
/// What a fork takes is little more than what moving takes.
const REST: u32 = 8;
/// For moving it back, and for a busy machine. A fixed rest would be longer.
const SOON: Duration = Duration::from_millis(120);

/// Forks a child that ends at once. How long that took its parent.
fn fork() -> Duration {
    let begun = Instant::now();
    // SAFETY: the child ends and does nothing else.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: ends the child and runs nothing of the parent's.
        unsafe { libc::_exit(0) };
    }
    let took = begun.elapsed();
    let mut status = 0;
    // SAFETY: a status of our own.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0);
    took
}

/// How long it is until the heap is on extents.
fn until_back() -> Duration {
    wait_for(&HEAP, "the heap is on extents", || {
        HEAP.stats().usage.extent_live >= LIVE as u64
    })
}

#[test]
fn what_a_fork_moved_comes_back_soon() {
    HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        ..Config::DEFAULT
    });
    let source = MemfdSource::leak(GRANULES);
    // The heap is not to hear that there is capacity again, which ends a rest.
    let mut last = Ranges::EMPTY;
    last.push(WindowRange {
        offset: ((GRANULES - 1) * GRANULE) as u64,
        len: GRANULE as u64,
    });
    source.withhold(&last);
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let block = HEAP.allocate(LIVE, 64, false);
    assert!(!block.is_null());
    // SAFETY: a new block of this size.
    unsafe { block.write_bytes(7, LIVE) };
    until_back();

    let mut late: Vec<Duration> = (0..FORKS)
        .map(|_| {
            let before = HEAP.stats().promoted;
            let took = fork();
            let late = until_back().saturating_sub(REST * took);
            assert!(HEAP.stats().promoted > before, "the fork moved nothing");
            late
        })
        .collect();
    late.sort();
    println!("{late:?}");
    assert!(late[FORKS / 2] < SOON, "{late:?}");
    // SAFETY: a live block of this size.
    let bytes = unsafe { std::slice::from_raw_parts(block, LIVE) };
    assert!(bytes.iter().all(|byte| *byte == 7));
}
