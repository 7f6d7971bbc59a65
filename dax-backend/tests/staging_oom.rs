//! Point 18: running out of memory while a group is staged still ends in exactly one answer.
//!
//! This file has an allocator of its own, which fails on demand for one thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;
use std::time::Instant;

use dax_backend::address::{Dpa, DpaRange};
use dax_backend::extent::Extent;
use dax_backend::staging::{Closed, Staging, StagingAction, StagingEvent, StagingLimits};

struct Failing;

thread_local! {
    /// Allocations of this thread that still succeed; `None` for no limit.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

fn may_allocate() -> bool {
    LEFT.with(|left| match left.get() {
        None => true,
        Some(0) => false,
        Some(count) => {
            left.set(Some(count - 1));
            true
        }
    })
}

// SAFETY: every call goes to `System`, which upholds the contract, or fails as the contract
// allows. `LEFT` is const-initialised and has no destructor, so using it allocates nothing.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !may_allocate() {
            return ptr::null_mut();
        }
        // SAFETY: the caller upholds the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: `block` came from `System` with this layout, see `alloc` and `realloc`.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !may_allocate() {
            return ptr::null_mut();
        }
        // SAFETY: `block` came from `System` with this layout, see `alloc`; the caller upholds
        // the rest of the contract of `GlobalAlloc::realloc`.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Failing = Failing;

fn extent(number: u64) -> Extent {
    Extent::untagged(DpaRange {
        start: Dpa(number << 21),
        len: 1 << 21,
    })
}

/// Stages a group of 100 with `allocations` to spare and counts its answers.
fn answers(allocations: usize) -> Vec<Closed> {
    const EXTENTS: u64 = 100;
    let now = Instant::now();
    let mut staging = Staging::new(StagingLimits::default());
    let mut answers = Vec::with_capacity(EXTENTS as usize);
    LEFT.set(Some(allocations));
    for number in 0..EXTENTS {
        let more = number + 1 < EXTENTS;
        let event = StagingEvent::Add {
            extent: extent(number),
            more,
        };
        if let StagingAction::Answer(group) = staging.step(now, event) {
            answers.push(group.closed);
        }
    }
    LEFT.set(None);
    // Whatever happened, the next group is a group of its own.
    let event = StagingEvent::Add {
        extent: extent(0),
        more: false,
    };
    let StagingAction::Answer(group) = staging.step(now, event) else {
        panic!("the next group is not answered");
    };
    assert_eq!((group.extents.len(), group.closed), (1, Closed::Complete));
    answers
}

#[test]
fn stalls_18_out_of_memory_ends_in_exactly_one_answer() {
    let mut failed = 0;
    for allocations in 0.. {
        match answers(allocations)[..] {
            [Closed::OutOfMemory] => failed += 1,
            [Closed::Complete] => break,
            ref other => panic!("with {allocations} allocations: {other:?}"),
        }
    }
    assert!(
        failed >= 2,
        "the group grew too seldom for the test to mean anything"
    );
}

#[test]
fn stalls_18_single_extent_without_memory_is_answered() {
    let mut staging = Staging::new(StagingLimits::default());
    LEFT.set(Some(0));
    let event = StagingEvent::Add {
        extent: extent(0),
        more: false,
    };
    let action = staging.step(Instant::now(), event);
    LEFT.set(None);
    let StagingAction::Answer(group) = action else {
        panic!("not answered")
    };
    assert_eq!(group.closed, Closed::OutOfMemory);
    assert!(!staging.is_discarding(), "its chain has ended");
}
