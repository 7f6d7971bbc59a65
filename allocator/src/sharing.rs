//! A fork that copies nothing: live extents are covered by placeholders, which
//! the child inherits, and the source gives each process a copy of what it
//! touches. What a fork can't share so is moved, as in [`crate::evacuation`].
//!
//! All of it is the worker's.

use core::sync::atomic::{AtomicI32, Ordering};
use core::time::Duration;

use crate::evacuation::Evacuator;
use crate::heap::Heap;
use crate::source::{ExtentSource, SharedRun, SharedRuns};
use crate::space::GRANULE;
use crate::space::rebind::Shelter;

/// Between attempts to map something while the kernel has no memory for it.
const RETRY: Duration = Duration::from_millis(10);
/// No userfaultfd yet; forks are not shared.
const NONE: i32 = -1;
const REFUSED: i32 = -2;

/// What a process's forks have in common.
pub(crate) struct Sharing {
    /// The number of the [`Shelter`]'s descriptor.
    shelter: AtomicI32,
}

impl Sharing {
    pub(crate) const fn new() -> Self {
        Self {
            shelter: AtomicI32::new(NONE),
        }
    }

    /// In a child: what its parent had is served as before, and what it makes
    /// originals of itself will be its own source's.
    pub(crate) fn forget(&self) {
        self.shelter.store(NONE, Ordering::Relaxed);
    }

    fn shelter(&self) -> Option<Shelter> {
        let fd = self.shelter.load(Ordering::Acquire);
        // SAFETY: opened by this thread, and never closed.
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
        if !source.fork_begin(&mut |runs| filled(heap, &shelter, runs)) {
            self.shelter.store(REFUSED, Ordering::Release);
            return false;
        }
        cover(heap, &shelter, evacuator);
        if source.fork_share(&|from| heap.space().next_covered(from)) {
            heap.space().end_sharing();
        } else {
            while let Some(run) = heap.space().next_covered(0) {
                uncover(heap, &shelter, &run);
            }
        }
        true
    }

    /// Hears of what this process has copies of.
    pub(crate) fn hear(&self, heap: &Heap, source: &dyn ExtentSource) {
        if let Some(shelter) = self.shelter() {
            while let Some(runs) = source.filled() {
                filled(heap, &shelter, &runs);
            }
        }
    }
}

fn filled(heap: &Heap, shelter: &Shelter, runs: &SharedRuns) {
    for run in runs.as_slice() {
        shelter.release(run.range());
        heap.space().filled(run);
    }
}

fn cover(heap: &Heap, shelter: &Shelter, evacuator: &Evacuator) {
    let (mut from, mut room) = (0, evacuator.movable());
    while let Some(at) = heap.space().pick_sharing(from, room) {
        from = at.end;
        // Each may become a mapping of its own by and by.
        room -= at.len() / GRANULE;
        // SAFETY: the space's own granules, in flight by its books; their
        // content stays readable in the extents, which stay with this process
        // or its family.
        let covered =
            evacuator.are_unchanged(at.clone()) && unsafe { shelter.cover(at.clone()) }.is_ok();
        heap.space().end_covering(at, covered);
    }
}

/// Threads wait meanwhile, so it is tried until it is done.
fn uncover(heap: &Heap, shelter: &Shelter, run: &SharedRun) {
    let alias = heap.space().alias(run.offset);
    // SAFETY: covered by the books, and shared with nobody.
    while unsafe { shelter.uncover(run.range(), alias) }.is_err() {
        std::thread::sleep(RETRY);
    }
    heap.space().uncovered(run);
}
