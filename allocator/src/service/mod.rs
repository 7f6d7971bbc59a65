//! The heap's own two threads: they keep unused granules ready, hear recalls,
//! let freed pages decay and return what is unused.
//!
//! The *worker* asks and returns, the *listener* hears. Both block every signal,
//! and neither allocates. A forked child has neither, and most children need
//! none; one that needs an extent gets its own then, from inside `malloc`.

mod answering;
mod asking;
mod losing;
mod standing;
mod threads;

use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use rustix::io::Errno;

use crate::evacuation::Evacuator;
use crate::heap::Heap;
use crate::sharing::Sharing;
use crate::source::{ExtentSource, Ranges, Recall};
use crate::space::{LOTS, Lot};
use crate::stats::{Stalls, Stats};
use crate::sync::{Lock, Signal};

/// The clock of a busy heap, and of one in which nothing changes.
pub(crate) const TICK: Duration = Duration::from_millis(50);
const TICK_QUIET: Duration = Duration::from_millis(500);
/// Recalls that wait for the worker; a broker sends one at a time.
const RECALLS: usize = 8;

/// What the two threads share with the heap.
pub(crate) struct Service {
    /// The worker is there, and stays: it is needed for forks even when there
    /// is nobody to talk to.
    alive: AtomicBool,
    /// The source answers.
    running: AtomicBool,
    /// A child's worker is looking for a source.
    joining: AtomicBool,
    source: Lock<Option<&'static dyn ExtentSource>>,
    /// The same, and in a child that of its parent.
    lender: Lock<Option<&'static dyn ExtentSource>>,
    adopted: Signal,
    /// The source has said that it has capacity again.
    plenty: AtomicBool,
    /// DRAM is short, and nothing was done about it yet.
    strained: AtomicBool,
    /// A request of each lot is on its way to the source.
    asked: [AtomicBool; LOTS],
    recalls: Lock<[Option<Recall>; RECALLS]>,
    /// Extents that are gone, which what moves may arrive on yet.
    landing: Lock<[Option<Ranges>; RECALLS]>,
    /// Somebody waits for all that is unused to be given back.
    trim: AtomicBool,
    grants: AtomicU64,
    returned: AtomicU64,
    recalled: [AtomicU64; 4],
    /// `RUNNING`, or what a fork wants of the worker.
    fork: AtomicU32,
    /// Raised when `fork` changes.
    forking: Signal,
    /// Live granules can be moved.
    moves: AtomicBool,
    /// What moves them.
    evacuator: Lock<Option<Evacuator>>,
    stalls: Lock<Stalls>,
    /// How far system calls were restricted when this child was made.
    sandbox: AtomicI32,
    sharing: Sharing,
}

/// Values of [`Service::fork`].
const RUNNING: u32 = 0;
const STOP: u32 = 1;
const STOPPED: u32 = 2;

impl Service {
    pub(crate) const fn new() -> Self {
        Self {
            alive: AtomicBool::new(false),
            running: AtomicBool::new(false),
            joining: AtomicBool::new(false),
            source: Lock::new(None),
            lender: Lock::new(None),
            adopted: Signal::new(),
            plenty: AtomicBool::new(false),
            strained: AtomicBool::new(false),
            asked: [const { AtomicBool::new(false) }; LOTS],
            recalls: Lock::new([None; RECALLS]),
            landing: Lock::new([None; RECALLS]),
            trim: AtomicBool::new(false),
            grants: AtomicU64::new(0),
            returned: AtomicU64::new(0),
            recalled: [const { AtomicU64::new(0) }; 4],
            fork: AtomicU32::new(RUNNING),
            forking: Signal::new(),
            moves: AtomicBool::new(false),
            evacuator: Lock::new(None),
            stalls: Lock::new(Stalls::NONE),
            sandbox: AtomicI32::new(0),
            sharing: Sharing::new(),
        }
    }

    /// Starts the threads and waits until the worker has the source's
    /// descriptors in a table of its own.
    pub(crate) fn start(
        &self,
        heap: &'static Heap,
        source: &'static dyn ExtentSource,
    ) -> Result<(), Errno> {
        *self.source.lock() = Some(source);
        *self.lender.lock() = Some(source);
        self.running.store(true, Ordering::Release);
        self.alive.store(true, Ordering::Release);
        let seen = self.adopted.read();
        if let Err(error) = threads::spawn(threads::worker, heap) {
            self.forget();
            return Err(error);
        }
        while self.adopted.read() == seen {
            self.adopted.wait(seen, Duration::from_secs(1));
        }
        source.thread_adopted();
        // From here on nothing that the threads need can land on an extent.
        heap.space().settle();
        heap.space().set_exhausted(false);
        Ok(())
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Whether this is a child whose source is being looked for.
    pub(crate) fn is_joining(&self) -> bool {
        self.joining.load(Ordering::Acquire)
    }

    /// The child's source is found, or there is none.
    fn joined(&self, heap: &Heap) {
        self.joining.store(false, Ordering::Release);
        heap.lent().raise();
    }

    /// In a child, or without threads: there are none, and the source is not
    /// this process's. Returns which ancestor left what is behind placeholders.
    pub(crate) fn forget(&self) -> u8 {
        for flag in [
            &self.running,
            &self.joining,
            &self.alive,
            &self.moves,
            &self.plenty,
            &self.strained,
            &self.trim,
        ]
        .into_iter()
        .chain(&self.asked)
        {
            flag.store(false, Ordering::Release);
        }
        self.fork.store(RUNNING, Ordering::Release);
        // A thread of the parent may have held these when the child was made.
        // SAFETY: the child has one thread, and it holds none.
        unsafe {
            self.source.force_unlock();
            self.lender.force_unlock();
            self.recalls.force_unlock();
            self.landing.force_unlock();
            self.stalls.force_unlock();
            self.evacuator.force_unlock();
        }
        // Its descriptors are the parent's.
        core::mem::forget(self.evacuator.lock().take());
        *self.source.lock() = None;
        *self.recalls.lock() = [None; RECALLS];
        *self.landing.lock() = [None; RECALLS];
        *self.stalls.lock() = Stalls::NONE;
        for counter in self.recalled.iter().chain([&self.grants, &self.returned]) {
            counter.store(0, Ordering::Relaxed);
        }
        self.sandbox.store(sandbox(), Ordering::Relaxed);
        self.sharing.forget()
    }

    /// In a child that needs an extent for the first time: starts a worker,
    /// which looks for a source. The caller does not wait. `false`: there is
    /// no worker, and it may be tried again.
    pub(crate) fn begin(&self, heap: &'static Heap) -> bool {
        // A child that has restricted itself since the fork (seccomp(2)) may
        // be killed for a thread or a socket. It stays in DRAM.
        if sandbox() != self.sandbox.load(Ordering::Relaxed) {
            return true;
        }
        self.joining.store(true, Ordering::Release);
        let begun = threads::spawn(threads::newborn, heap).is_ok();
        if !begun {
            self.joined(heap);
        }
        begun
    }

    /// Who lends to this process, or did to the one that it was forked from.
    pub(crate) fn lender(&self) -> Option<&'static dyn ExtentSource> {
        *self.lender.lock()
    }

    fn source(&self) -> Option<&'static dyn ExtentSource> {
        *self.source.lock()
    }

    /// Adds what was counted here.
    pub(crate) fn count(&self, stats: &mut Stats) {
        stats.grants = self.grants.load(Ordering::Relaxed);
        stats.returned = self.returned.load(Ordering::Relaxed);
        let [recalls, asked, back, refused] =
            [0, 1, 2, 3].map(|i| self.recalled[i].load(Ordering::Relaxed));
        stats.recalls = recalls;
        stats.recall_asked = asked;
        stats.recall_returned = back;
        stats.recall_refused = refused;
        stats.moves_live = self.moves.load(Ordering::Relaxed);
        stats.stalls = *self.stalls.lock();
    }

    pub(crate) fn publish(&self, heap: &'static Heap) {
        if self.is_running()
            && let Some(source) = self.source()
        {
            heap.report_to(source);
        }
    }

    /// Sets what moves granules; whether it can spill some.
    fn take_up(&self, evacuator: Option<Evacuator>) -> bool {
        self.moves.store(evacuator.is_some(), Ordering::Release);
        let spills = evacuator.as_ref().is_some_and(|e| e.bell().is_some());
        *self.evacuator.lock() = evacuator;
        spills
    }

    fn take_recall(&self) -> Option<Recall> {
        self.recalls.lock().iter_mut().find_map(Option::take)
    }

    /// Ends what [`Supply::lose_patience`] began, unless the source owes an
    /// answer: nothing would end it otherwise.
    ///
    /// [`Supply::lose_patience`]: crate::engine::Supply::lose_patience
    fn regain_patience(&self, heap: &Heap) {
        for lot in Lot::all() {
            if !self.asked[lot.index()].load(Ordering::Acquire) && heap.supply().be_patient(lot) {
                heap.space().set_lot_exhausted(lot, false);
                // Who waits on may ask again.
                heap.lent().raise();
            }
        }
    }

    /// The heap goes on with what it has. Who waits for extents may go on
    /// waiting: the source may be back in time.
    fn away(&self, heap: &Heap) {
        for lot in Lot::all() {
            heap.supply().be_patient(lot);
        }
        heap.space().set_exhausted(true);
        self.asked
            .iter()
            .for_each(|asked| asked.store(false, Ordering::Release));
        heap.lent().raise();
    }

    fn closed(&self, heap: &Heap) {
        self.running.store(false, Ordering::Release);
        for lot in Lot::all() {
            heap.supply().be_patient(lot);
        }
        heap.space().set_exhausted(true);
        heap.expect_none();
        heap.lent().raise();
    }
}

/// `PR_GET_SECCOMP`: 0 without a filter; negative where that can't be told.
fn sandbox() -> i32 {
    // SAFETY: reads a number.
    unsafe { libc::prctl(libc::PR_GET_SECCOMP) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread that waited too long made the heap take DRAM for ever where
    /// nobody had asked the source: on a busy machine the worker had come late.
    #[test]
    fn lost_patience_comes_back_unless_an_answer_is_owed() {
        static HEAP: Heap = Heap::new();
        let (service, supply, space) = (HEAP.service(), HEAP.supply(), HEAP.space());
        space.set_exhausted(false);
        supply.lose_patience(space, Lot::UNTAGGED);
        assert!(space.is_exhausted());
        service.asked[0].store(true, Ordering::Release);
        service.regain_patience(&HEAP);
        assert!(space.is_exhausted(), "the source has not answered");
        service.asked[0].store(false, Ordering::Release);
        service.regain_patience(&HEAP);
        assert!(!space.is_exhausted());

        // What the source itself has said stands.
        space.set_exhausted(true);
        supply.lose_patience(space, Lot::UNTAGGED);
        service.regain_patience(&HEAP);
        assert!(space.is_exhausted());
    }
}
