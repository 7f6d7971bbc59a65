//! The threads that wait for a granule: written by the monitor, emptied by
//! the mover, in fixed memory and without locks.
#![forbid(unsafe_code)]

use super::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use super::{GRANULE, PAGE};
use core::ops::Range;
use core::sync::atomic::Ordering::*;

/// How many waits are known at a time. When more threads wait than this, the
/// rest is forgotten, all are woken, and those that must still wait report
/// again.
const SLOTS: usize = 128;

struct Slot {
    /// Address of the page waited for; 0 when the slot is free.
    page: AtomicUsize,
    /// Who waits.
    thread: AtomicU64,
    /// When the monitor heard of it (CLOCK_MONOTONIC, nanoseconds).
    since: AtomicU64,
}

impl Slot {
    #[allow(
        clippy::declare_interior_mutable_const,
        reason = "an array's initial value"
    )]
    const FREE: Self = Self {
        page: AtomicUsize::new(0),
        thread: AtomicU64::new(0),
        since: AtomicU64::new(0),
    };
}

impl Slot {
    /// Address of the granule waited for; 0 when the slot is free.
    fn granule(&self) -> usize {
        self.page.load(Acquire) & !(GRANULE - 1)
    }
}

/// One thread fills slots and one frees them, so that neither needs more than
/// a store.
pub(super) struct Waiters<const COUNT: usize = SLOTS> {
    slots: [Slot; COUNT],
    overflowed: AtomicBool,
}

impl<const COUNT: usize> Waiters<COUNT> {
    pub(super) const fn new() -> Self {
        Self {
            slots: [const { Slot::FREE }; COUNT],
            overflowed: AtomicBool::new(false),
        }
    }

    /// Monitor only: `thread` began to wait for `address`.
    pub(super) fn insert(&self, address: usize, thread: i32, now: u64) {
        let free = self.slots.iter().find(|s| s.page.load(Acquire) == 0);
        let Some(slot) = free else {
            self.overflowed.store(true, Release);
            return;
        };
        slot.since.store(now, Relaxed);
        slot.thread.store(thread as u64, Relaxed);
        slot.page.store(address & !(PAGE - 1), Release);
    }

    /// Mover only: takes the waits on a granule out; `each` gets the moment
    /// every one of them began.
    pub(super) fn remove(&self, granule: usize, mut each: impl FnMut(u64)) {
        for slot in &self.slots {
            if slot.granule() == granule {
                let since = slot.since.load(Relaxed);
                slot.page.store(0, Release);
                each(since);
            }
        }
    }

    /// Mover only: forgets all waits.
    pub(super) fn clear(&self) {
        for slot in &self.slots {
            slot.page.store(0, Release);
        }
    }

    /// The page that `thread` waits for, of its waits since `began` the last.
    pub(super) fn latest_of(&self, thread: i32, began: u64) -> Option<usize> {
        let waits = self.slots.iter().filter_map(|slot| {
            let page = slot.page.load(Acquire);
            let since = slot.since.load(Relaxed);
            let its = page != 0 && slot.thread.load(Relaxed) == thread as u64 && since >= began;
            its.then_some((since, page))
        });
        waits.max().map(|(_, page)| page)
    }

    /// The granule in the range that a thread has waited for longest.
    pub(super) fn longest(&self, range: Range<usize>) -> Option<usize> {
        let waits = self.slots.iter().filter_map(|slot| {
            let granule = slot.granule();
            let wanted = granule != 0 && range.contains(&granule);
            wanted.then(|| (slot.since.load(Relaxed), granule))
        });
        waits.min().map(|(_, granule)| granule)
    }

    /// Mover only: whether waits were forgotten since the last call.
    pub(super) fn take_overflow(&self) -> bool {
        self.overflowed.swap(false, AcqRel)
    }
}
