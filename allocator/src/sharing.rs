//! A fork that copies nothing: live extents are covered by placeholders, which
//! the child inherits, and the source gives each process a copy of what it
//! touches. What a fork can't share so is moved, as in [`crate::evacuation`].
//!
//! All of it is the worker's.

use core::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use core::time::Duration;

use crate::evacuation::Evacuator;
use crate::heap::Heap;
use crate::source::{ANCESTORS, ExtentSource, Inherited, SharedRun, SharedRuns};
use crate::space::rebind::{Aside, Mark, Shelter};
use crate::space::{GRANULE, NO_LINE};

/// Between attempts to map something while the kernel has no memory for it.
const RETRY: Duration = Duration::from_millis(10);
/// So many runs of granules are set aside for a fork.
const ASIDES: usize = 64;
/// Bytes from which on that is worth two system calls.
const WORTH_MOVING: usize = 4 * GRANULE;
/// So many times a tick originals are asked for.
const TAKES: usize = 64;
/// No userfaultfd yet; forks are not shared.
const NONE: i32 = -1;
const REFUSED: i32 = -2;

/// What a process's forks have in common.
pub(crate) struct Sharing {
    /// The number of the [`Shelter`]'s descriptor.
    shelter: AtomicI32,
    /// The address of its [`Mark`]; 0: none.
    mark: AtomicUsize,
    ancestors: [Ancestor; ANCESTORS],
}

/// Who forked and left something to this process.
struct Ancestor {
    /// The address of its [`Mark`]; 0: nobody.
    mark: AtomicUsize,
    /// Its fork server says what this process has copies of.
    heard: AtomicBool,
}

impl Sharing {
    pub(crate) const fn new() -> Self {
        Self {
            shelter: AtomicI32::new(NONE),
            mark: AtomicUsize::new(0),
            ancestors: [const {
                Ancestor {
                    mark: AtomicUsize::new(0),
                    heard: AtomicBool::new(false),
                }
            }; ANCESTORS],
        }
    }

    /// In a child: what its parent had is served as before, and what it makes
    /// originals of itself will be its own source's. Returns the parent's
    /// number among the ancestors.
    pub(crate) fn forget(&self) -> u8 {
        self.shelter.store(NONE, Ordering::Relaxed);
        for ancestor in &self.ancestors {
            ancestor.heard.store(false, Ordering::Relaxed);
        }
        let mark = self.mark.swap(0, Ordering::Relaxed);
        let free = |ancestor: &Ancestor| ancestor.mark.load(Ordering::Relaxed) == 0;
        match self.ancestors.iter().position(free) {
            Some(line) if mark != 0 => {
                self.ancestors[line].mark.store(mark, Ordering::Relaxed);
                line as u8
            }
            _ => NO_LINE,
        }
    }

    /// In a child that has a source: finds those who serve what it inherited.
    pub(crate) fn join(&self, heap: &Heap, source: &dyn ExtentSource) {
        for (line, ancestor) in (0..).zip(&self.ancestors) {
            let mark = ancestor.mark.load(Ordering::Relaxed);
            if mark == 0 {
                continue;
            }
            // SAFETY: an ancestor's, which nobody else touches.
            match unsafe { Mark::read(mark) } {
                // Nobody serves it, because there is nothing left to be served.
                Ok([0, 0]) => heap.space().filled_all(line),
                Ok(name) => {
                    let heard = source.join_family(line, name);
                    ancestor.heard.store(heard, Ordering::Relaxed);
                }
                Err(_) => {}
            }
        }
    }

    fn hear_ancestors(&self, heap: &Heap, source: &dyn ExtentSource) {
        for (line, ancestor) in (0..).zip(&self.ancestors) {
            while ancestor.heard.load(Ordering::Relaxed) {
                match source.inherited(line) {
                    Inherited::Nothing => break,
                    Inherited::Filled(runs) => {
                        let filled = |run| heap.space().inherited_filled(run, line);
                        runs.as_slice().iter().for_each(filled);
                    }
                    Inherited::All => {
                        heap.space().filled_all(line);
                        ancestor.heard.store(false, Ordering::Relaxed);
                    }
                }
            }
        }
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
            let served = opened.and_then(|shelter| {
                let mark = Mark::new().ok()?;
                let served = source.serve_forks(shelter.fd(), mark.addr());
                (served && mark.register(&shelter).is_ok()).then_some((shelter, mark))
            });
            let fd = served.map_or(REFUSED, |(shelter, mark)| {
                self.mark.store(mark.addr(), Ordering::Relaxed);
                shelter.as_raw()
            });
            self.shelter.store(fd, Ordering::Release);
        }
        self.shelter()
    }

    /// Covers and shares all that is live on extents and may be. If the source
    /// was told of a fork, and wants to hear of its end: what is to be dropped
    /// once the child is made.
    pub(crate) fn share(
        &self,
        heap: &Heap,
        source: &dyn ExtentSource,
        evacuator: &Evacuator,
    ) -> Option<Asides> {
        let shelter = self.prepare(source)?;
        if !source.fork_begin(&mut |runs| filled(heap, runs)) {
            self.shelter.store(REFUSED, Ordering::Release);
            // The kernel would have forks wait for whoever served them. While
            // something is behind a placeholder that is better than zeroes.
            if !heap.space().has_originals() {
                shelter.close();
            }
            return None;
        }
        let asides = cover(heap, &shelter, evacuator);
        if source.fork_share(&|from| heap.space().next_covered(from)) {
            heap.space().end_sharing();
        } else {
            while let Some(run) = heap.space().next_covered(0) {
                uncover(heap, &shelter, &run);
            }
        }
        Some(asides)
    }

    /// Hears of what this process has copies of, and takes back what nobody
    /// else needs.
    pub(crate) fn hear(&self, heap: &Heap, source: &dyn ExtentSource) {
        self.hear_ancestors(heap, source);
        let Some(shelter) = self.shelter() else {
            return;
        };
        while let Some(runs) = source.filled() {
            filled(heap, &runs);
        }
        let mut from = 0;
        // What the program did to a placeholder would be undone.
        let may = |run: &SharedRun| heap.service().is_as_covered(run.range());
        for _ in 0..TAKES {
            if !heap.space().has_originals() {
                break;
            }
            let filled = &mut |runs: &SharedRuns| filled(heap, runs);
            let Some(back) = source.fork_take(&mut from, &may, filled) else {
                break;
            };
            if back.as_slice().is_empty() {
                continue;
            }
            for run in back.as_slice() {
                uncover(heap, &shelter, run);
            }
            source.fork_taken();
        }
    }
}

fn filled(heap: &Heap, runs: &SharedRuns) {
    let filled = |run| heap.space().filled(run);
    runs.as_slice().iter().for_each(filled);
}

/// Old pages of what was covered.
pub(crate) type Asides = [Option<Aside>; ASIDES];

fn cover(heap: &Heap, shelter: &Shelter, evacuator: &Evacuator) -> Asides {
    let mut asides = [const { None }; ASIDES];
    let mut left = asides.iter_mut();
    let (mut from, mut room) = (0, evacuator.movable());
    while let Some(at) = heap.space().pick_sharing(from, room) {
        from = at.end;
        // Each may become a mapping of its own by and by.
        room -= at.len() / GRANULE;
        let begun = evacuator.now();
        let unchanged = evacuator.are_unchanged(at.clone());
        let mut next = at.start;
        while unchanged && let Some(run) = heap.space().neighbours(next, at.end) {
            next = run.end;
            // A few pages are unmapped sooner than moved.
            if run.len() >= WORTH_MOVING
                && let Some(free) = left.next()
            {
                // SAFETY: the space's own granules, in flight by its books.
                *free = unsafe { Shelter::set_aside(run) }.ok();
            }
        }
        // SAFETY: as above; their content stays readable in the extents, which
        // stay with this process or its family.
        let covered = unchanged && unsafe { shelter.cover(at.clone()) }.is_ok();
        heap.space().end_covering(at.clone(), covered);
        // Direct I/O goes on into extents, of which copies are made from here on.
        if covered && !evacuator.no_transfer(&at, begun) {
            while let Some(run) = heap.space().next_covered(at.start)
                && run.addr < at.end
            {
                uncover(heap, shelter, &run);
            }
        }
    }
    asides
}

/// Threads wait meanwhile, so it is tried until it is done.
fn uncover(heap: &Heap, shelter: &Shelter, run: &SharedRun) {
    let alias = heap.space().alias(run.offset);
    // SAFETY: covered by the books, and shared with nobody any more.
    while unsafe { shelter.uncover(run.range(), alias) }.is_err() {
        std::thread::sleep(RETRY);
    }
    heap.space().uncovered(run);
}
