//! A fork that copies nothing: live extents are covered by placeholders, which
//! the child inherits, and the source gives each process a copy of what it
//! touches. What a fork can't share so is moved, as in [`crate::evacuation`].
//!
//! Sharing is the worker's. What comes back later is heard by the listener.

use core::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use core::time::Duration;
use std::time::Instant;

use crate::evacuation::Evacuator;
use crate::heap::Heap;
use crate::source::{ExtentSource, RUNS_PER_EVENT, SharedRun};
use crate::space::GRANULE;
use crate::space::rebind::Shelter;
use crate::sync::Signal;

/// What was restored before a fork is here by then.
const PATIENCE: Duration = Duration::from_secs(4);
/// Between attempts to map something while the kernel has no memory for it.
const RETRY: Duration = Duration::from_millis(10);
/// No userfaultfd yet; forks are not shared.
const NONE: i32 = -1;
const REFUSED: i32 = -2;

/// What worker and listener share about forks.
pub(crate) struct Sharing {
    /// The number of the [`Shelter`]'s descriptor.
    shelter: AtomicI32,
    /// Granules restored, since the source began to serve.
    restored: AtomicU64,
    /// Raised when that changes.
    back: Signal,
}

impl Sharing {
    pub(crate) const fn new() -> Self {
        Self {
            shelter: AtomicI32::new(NONE),
            restored: AtomicU64::new(0),
            back: Signal::new(),
        }
    }

    /// In a child: what its parent had is served as before, and what it makes
    /// originals of itself will be its own source's.
    pub(crate) fn forget(&self) {
        self.shelter.store(NONE, Ordering::Relaxed);
        self.restored.store(0, Ordering::Relaxed);
    }

    fn shelter(&self) -> Option<Shelter> {
        let fd = self.shelter.load(Ordering::Acquire);
        // SAFETY: opened by the worker, in whose descriptor table the listener
        // is too, and never closed.
        (fd >= 0).then(|| unsafe { Shelter::from_raw(fd) })
    }

    /// The shelter, opened and handed to the source at the first fork.
    fn prepare(&self, source: &dyn ExtentSource) -> Option<Shelter> {
        if self.shelter.load(Ordering::Relaxed) == NONE {
            let opened = Shelter::open(source.userfaultfd()).ok();
            let served = opened.filter(|shelter| source.serve_forks(shelter.fd()));
            let fd = served.map_or(REFUSED, |shelter| shelter.as_raw());
            self.shelter.store(fd, Ordering::Release);
        }
        self.shelter()
    }

    /// Covers and shares all that is live on extents and may be. Returns
    /// whether the source was told of a fork, and wants to hear of its end.
    pub(crate) fn share(
        &self,
        heap: &Heap,
        source: &dyn ExtentSource,
        evacuator: &Evacuator,
    ) -> bool {
        let Some(shelter) = self.prepare(source) else {
            return false;
        };
        let Some(restored) = source.fork_begin() else {
            self.shelter.store(REFUSED, Ordering::Release);
            return false;
        };
        if self.wait_for(restored) {
            cover(heap, &shelter, evacuator);
            if tell(heap, source) {
                heap.space().end_sharing();
            } else {
                while let Some(run) = heap.space().next_covered(0) {
                    uncover(heap, &shelter, &run);
                }
            }
        }
        true
    }

    /// Whether as many granules have been restored.
    fn wait_for(&self, restored: u64) -> bool {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.back.read();
            if self.restored.load(Ordering::Acquire) >= restored {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            self.back.wait(seen, left);
        }
    }

    /// Only this process needs some originals now: they are put back.
    pub(crate) fn restored(&self, heap: &Heap, runs: &[SharedRun]) {
        let Some(shelter) = self.shelter() else {
            return;
        };
        for run in runs {
            uncover(heap, &shelter, run);
            let granules = (run.len / GRANULE) as u64;
            self.restored.fetch_add(granules, Ordering::Release);
        }
        self.back.raise();
    }

    /// This process has its own copy of some originals.
    pub(crate) fn filled(&self, heap: &Heap, runs: &[SharedRun]) {
        let Some(shelter) = self.shelter() else {
            return;
        };
        for run in runs {
            shelter.release(run.range());
            heap.space().filled(run);
        }
    }
}

fn cover(heap: &Heap, shelter: &Shelter, evacuator: &Evacuator) {
    let mut from = 0;
    while let Some(at) = heap.space().pick_sharing(from) {
        from = at.end;
        // SAFETY: the space's own granules, in flight by its books; their
        // content stays readable in the extents, which stay with this process
        // or its family.
        let covered =
            evacuator.are_unchanged(at.clone()) && unsafe { shelter.cover(at.clone()) }.is_ok();
        heap.space().end_covering(at, covered);
    }
}

/// Tells the source what is covered.
fn tell(heap: &Heap, source: &dyn ExtentSource) -> bool {
    let mut runs = [SharedRun::default(); RUNS_PER_EVENT];
    let (mut count, mut from) = (0, 0);
    while let Some(run) = heap.space().next_covered(from) {
        from = run.range().end;
        if count == runs.len() {
            if !source.fork_share(&runs, false) {
                return false;
            }
            count = 0;
        }
        runs[count] = run;
        count += 1;
    }
    count == 0 || source.fork_share(&runs[..count], true)
}

/// Threads wait meanwhile, so it is tried until it is done.
fn uncover(heap: &Heap, shelter: &Shelter, run: &SharedRun) {
    let alias = heap.space().alias(run.offset);
    // SAFETY: covered by the books, and nobody else needs the originals.
    while unsafe { shelter.uncover(run.range(), alias) }.is_err() {
        std::thread::sleep(RETRY);
    }
    heap.space().restored(run);
}
