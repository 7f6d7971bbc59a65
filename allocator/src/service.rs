//! The heap's own two threads: they keep unused granules ready, hear recalls,
//! let freed pages decay and return what is unused.
//!
//! The *worker* asks and returns, the *listener* hears. Neither is started
//! inside `malloc`, both block every signal, and neither allocates.

use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use core::time::Duration;
use rustix::io::Errno;
use std::time::Instant;

use crate::engine;
use crate::evacuation::{Evacuated, Evacuator};
use crate::heap::Heap;
use crate::source::{Event, ExtentSource, Ranges, Recall, RecallOutcome, Refusal};
use crate::space::GRANULE;
use crate::stats::{Stalls, Stats};
use crate::sync::{Lock, Signal};

/// The clock of a busy heap, and of one in which nothing changes.
pub(crate) const TICK: Duration = Duration::from_millis(50);
const TICK_QUIET: Duration = Duration::from_millis(500);
/// For so many ticks after a recall the reserve is not filled up again, unless
/// the source says that it has more: what was just given back is not asked for
/// in the same breath.
const RESTRAINT: u32 = 20;
/// Recalls that wait for the worker; a broker sends one at a time.
const RECALLS: usize = 8;
/// Room for the thread-locals of the program and its libraries, which share
/// the stack's mapping, besides a few pages of our own.
const STACK: usize = 512 << 10;

/// malloc_trim waits no longer than this.
const TRIM_PATIENCE: Duration = Duration::from_secs(1);
/// A recall of the heap's own: of nothing in particular.
const NOTHING: Recall = Recall {
    id: 0,
    bytes: 0,
    deadline: TICK,
    ranges: Ranges::EMPTY,
};

/// What the two threads share with the heap.
pub(crate) struct Service {
    /// The worker is there, and stays: it is needed for forks even when there
    /// is nobody to talk to.
    alive: AtomicBool,
    /// The source answers.
    running: AtomicBool,
    source: Lock<Option<&'static dyn ExtentSource>>,
    adopted: Signal,
    /// The source has said that it has capacity again.
    plenty: AtomicBool,
    /// A request is on its way to the source.
    asked: AtomicBool,
    recalls: Lock<[Option<Recall>; RECALLS]>,
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
    stalls: Lock<Stalls>,
}

/// Values of [`Service::fork`].
const RUNNING: u32 = 0;
const STOP: u32 = 1;
const STOPPED: u32 = 2;
/// A fork does not wait for longer than this for extents to be emptied: a GiB
/// takes a second at worst.
const FORK_PATIENCE: Duration = Duration::from_secs(60);

impl Service {
    pub(crate) const fn new() -> Self {
        Self {
            alive: AtomicBool::new(false),
            running: AtomicBool::new(false),
            source: Lock::new(None),
            adopted: Signal::new(),
            plenty: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            recalls: Lock::new([None; RECALLS]),
            trim: AtomicBool::new(false),
            grants: AtomicU64::new(0),
            returned: AtomicU64::new(0),
            recalled: [const { AtomicU64::new(0) }; 4],
            fork: AtomicU32::new(RUNNING),
            forking: Signal::new(),
            moves: AtomicBool::new(false),
            stalls: Lock::new(Stalls::NONE),
        }
    }

    /// Empties every extent of the heap into DRAM and holds the worker, so
    /// that a child made now inherits all of the heap, and no granule in
    /// flight. Until [`Service::resume`] new granules are DRAM.
    pub(crate) fn stop(&self, heap: &Heap) {
        if !self.alive.load(Ordering::Acquire) || !self.moves.load(Ordering::Acquire) {
            return;
        }
        heap.space().set_extents_closed(true);
        self.fork.store(STOP, Ordering::Release);
        heap.wanted().raise();
        let deadline = Instant::now() + FORK_PATIENCE;
        while self.fork.load(Ordering::Acquire) == STOP {
            let seen = self.forking.read();
            let left = deadline.saturating_duration_since(Instant::now());
            if self.fork.load(Ordering::Acquire) != STOP || left.is_zero() {
                break;
            }
            self.forking.wait(seen, left);
        }
    }

    /// Ends what [`Service::stop`] began, in the parent.
    pub(crate) fn resume(&self, heap: &Heap) {
        self.fork.store(RUNNING, Ordering::Release);
        self.forking.raise();
        heap.space().set_extents_closed(false);
    }

    /// The worker's side of [`Service::stop`].
    fn stand_still(
        &self,
        heap: &Heap,
        source: &dyn ExtentSource,
        evacuator: &mut Option<Evacuator>,
    ) -> bool {
        if self.fork.load(Ordering::Acquire) != STOP {
            return false;
        }
        if let Some(evacuator) = evacuator {
            evacuator.clear(heap, source);
        }
        let _ = self
            .fork
            .compare_exchange(STOP, STOPPED, Ordering::AcqRel, Ordering::Relaxed);
        self.forking.raise();
        while self.fork.load(Ordering::Acquire) == STOPPED {
            let seen = self.forking.read();
            if self.fork.load(Ordering::Acquire) == STOPPED {
                self.forking.wait(seen, TICK_QUIET);
            }
        }
        true
    }

    /// Starts the threads and waits until the worker has the source's
    /// descriptors in a table of its own.
    pub(crate) fn start(
        &self,
        heap: &'static Heap,
        source: &'static dyn ExtentSource,
    ) -> Result<(), Errno> {
        *self.source.lock() = Some(source);
        self.running.store(true, Ordering::Release);
        self.alive.store(true, Ordering::Release);
        let seen = self.adopted.read();
        if let Err(error) = spawn(worker, heap) {
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

    /// Gives back all that is unused, the reserve included, and returns when
    /// that is done.
    pub(crate) fn trim(&self, heap: &Heap) {
        if !self.is_running() {
            return;
        }
        self.trim.store(true, Ordering::Release);
        let deadline = Instant::now() + TRIM_PATIENCE;
        while self.trim.load(Ordering::Acquire) {
            let seen = heap.lent().read();
            heap.wanted().raise();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if self.trim.load(Ordering::Acquire) {
                heap.lent().wait(seen, left);
            }
        }
    }

    /// The worker's side of [`Service::trim`].
    fn trimmed(&self, heap: &Heap, source: &dyn ExtentSource) -> bool {
        let asked = self.trim.load(Ordering::Acquire);
        if asked && self.is_running() {
            let all = Recall {
                bytes: heap.space().usage().idle,
                ..NOTHING
            };
            self.give_back(heap, source, &all, 0);
            self.trim.store(false, Ordering::Release);
            heap.lent().raise();
        }
        asked
    }

    /// In a child: there are no threads, and the source is the parent's.
    pub(crate) fn forget(&self) {
        self.running.store(false, Ordering::Release);
        self.alive.store(false, Ordering::Release);
        // A thread of the parent may have held these when the child was made.
        // SAFETY: the child has one thread, and it holds neither.
        unsafe {
            self.source.force_unlock();
            self.recalls.force_unlock();
            self.stalls.force_unlock();
        }
        *self.source.lock() = None;
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
            source.publish(&heap.stats());
        }
    }

    /// Gives back up to `granules` unused ones of a recall's ranges.
    fn give_back(
        &self,
        heap: &Heap,
        source: &dyn ExtentSource,
        recall: &Recall,
        min_age: u32,
    ) -> u64 {
        let mut left = recall.bytes as usize / GRANULE;
        let mut bytes = 0;
        while left > 0 {
            let ranges = heap
                .space()
                .take_idle(left, recall.ranges.as_slice(), min_age);
            if ranges.is_empty() {
                break;
            }
            source.give_back(&ranges);
            left -= (ranges.bytes() as usize / GRANULE).min(left);
            bytes += ranges.bytes();
        }
        self.returned.fetch_add(bytes, Ordering::Relaxed);
        bytes
    }

    /// The chain: what is unused, what a purge of the engine empties, what can
    /// be moved; the rest is refused.
    fn answer(
        &self,
        heap: &Heap,
        source: &dyn ExtentSource,
        recall: &Recall,
        evacuator: &mut Option<Evacuator>,
    ) {
        let until = Instant::now() + recall.deadline;
        let mut idle = self.give_back(heap, source, recall, 0);
        if idle < recall.bytes {
            heap.extent_arenas().for_each(engine::purge);
            let rest = Recall {
                bytes: recall.bytes - idle,
                ..*recall
            };
            idle += self.give_back(heap, source, &rest, 0);
        }
        let mut moved = Evacuated {
            bytes: 0,
            stopped: Some(Refusal::CannotMove),
        };
        if idle < recall.bytes
            && let Some(evacuator) = evacuator
        {
            let rest = Recall {
                bytes: recall.bytes - idle,
                ..*recall
            };
            moved = evacuator.recall(heap, source, &rest, until);
            *self.stalls.lock() = evacuator.stalls();
            // What became unused while others moved.
            let rest = Recall {
                bytes: rest.bytes.saturating_sub(moved.bytes),
                ..rest
            };
            idle += self.give_back(heap, source, &rest, 0);
        }
        let held = heap.space().live_bytes_in(recall.ranges.as_slice());
        let refused = held.min(recall.bytes.saturating_sub(idle + moved.bytes));
        let reason = if refused > 0 {
            moved.stopped.or(Some(Refusal::CannotMove))
        } else {
            None
        };
        let counted = [1, recall.bytes, idle + moved.bytes, refused];
        for (counter, value) in self.recalled.iter().zip(counted) {
            counter.fetch_add(value, Ordering::Relaxed);
        }
        source.answer(
            recall.id,
            &RecallOutcome {
                idle,
                rebound: moved.bytes,
                refused,
                reason,
            },
        );
    }

    /// Gives back what has been unused for long enough, but for the reserve.
    fn give_back_surplus(&self, heap: &Heap, source: &dyn ExtentSource) {
        let surplus = Recall {
            bytes: (heap.space().surplus() * GRANULE) as u64,
            ..NOTHING
        };
        let min_age = heap.config().return_after_ms / TICK.as_millis() as u32;
        self.give_back(heap, source, &surplus, min_age);
    }

    fn take_recall(&self) -> Option<Recall> {
        self.recalls.lock().iter_mut().find_map(Option::take)
    }

    /// Asks for what waiting threads lack and, if `reserve`, for what the
    /// reserve lacks.
    fn ask(&self, heap: &Heap, source: &dyn ExtentSource, reserve: bool) {
        let demand = heap.demand().swap(0, Ordering::AcqRel);
        let short = demand.saturating_sub(heap.space().idle_granules());
        let reserve = reserve && !heap.space().is_exhausted();
        let mut ask = short;
        if reserve {
            let displaced = match self.moves.load(Ordering::Relaxed) {
                true => heap.space().displaced().min(heap.back_per_tick()),
                false => 0,
            };
            let idle = heap.space().idle_granules();
            ask += heap.space().short_of().max(displaced.saturating_sub(idle));
        }
        if ask == 0 {
            if demand > 0 {
                heap.lent().raise();
            }
        } else if self.asked.swap(true, Ordering::AcqRel) {
            heap.demand().fetch_max(demand, Ordering::AcqRel);
        } else if !source.request((ask * GRANULE) as u64) {
            self.closed(heap);
        }
    }

    fn closed(&self, heap: &Heap) {
        self.running.store(false, Ordering::Release);
        heap.space().set_exhausted(true);
        heap.expect_none();
        heap.lent().raise();
    }
}

/// Starts a thread of this service. `pthread_create` allocates, so this is
/// never called inside `malloc`; the heap works without the thread meanwhile.
fn spawn(
    main: extern "C" fn(*mut c_void) -> *mut c_void,
    heap: &'static Heap,
) -> Result<(), Errno> {
    // SAFETY: plain libc calls on values that live here; the thread gets a
    // reference that lives for ever.
    let code = unsafe {
        let mut attr = core::mem::zeroed();
        libc::pthread_attr_init(&mut attr);
        libc::pthread_attr_setstacksize(&mut attr, STACK);
        libc::pthread_attr_setdetachstate(&mut attr, libc::PTHREAD_CREATE_DETACHED);
        let (mut all, mut before) = (core::mem::zeroed(), core::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let mut thread = 0;
        let argument = (heap as *const Heap).cast_mut().cast();
        let code = libc::pthread_create(&mut thread, &attr, main, argument);
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, null_mut());
        libc::pthread_attr_destroy(&mut attr);
        code
    };
    if code == 0 {
        Ok(())
    } else {
        Err(Errno::from_raw_os_error(code))
    }
}

extern "C" fn worker(heap: *mut c_void) -> *mut c_void {
    // SAFETY: `spawn` passed a heap that lives for ever.
    let heap: &'static Heap = unsafe { &*heap.cast::<Heap>() };
    let service = heap.service();
    let Some(source) = service.source() else {
        return null_mut();
    };
    let _ = rustix::thread::set_name(c"dcmalloc");
    source.adopt_thread();
    let mut evacuator = Evacuator::start(source);
    service.moves.store(evacuator.is_some(), Ordering::Release);
    // Without it nothing would be heard; then the heap has no source.
    if spawn(listener, heap).is_err() {
        service.closed(heap);
    }
    service.adopted.raise();
    let (mut quiet, mut restraint) = (0, 0u32);
    let mut before = heap.space().usage();
    let mut last_tick = Instant::now();
    loop {
        let seen = heap.wanted().read();
        if service.stand_still(heap, source, &mut evacuator) || service.trimmed(heap, source) {
            restraint = RESTRAINT;
        }
        if service.plenty.swap(false, Ordering::AcqRel) {
            restraint = 0;
        }
        while let Some(recall) = service.take_recall() {
            // What threads lacked may be met by now; who still waits says so.
            heap.demand().store(0, Ordering::Release);
            service.answer(heap, source, &recall, &mut evacuator);
            heap.lent().raise();
            restraint = RESTRAINT;
        }
        if service.is_running() {
            service.ask(heap, source, restraint == 0);
        }
        let patience = if quiet > 20 { TICK_QUIET } else { TICK };
        heap.wanted()
            .wait(seen, patience.saturating_sub(last_tick.elapsed()));
        // A clock of its own: how often somebody calls is no measure of time.
        if last_tick.elapsed() < TICK {
            continue;
        }
        last_tick = Instant::now();
        restraint = restraint.saturating_sub(1);
        heap.space().tick();
        heap.extent_arenas().for_each(engine::decay);
        if service.is_running() {
            if restraint == 0
                && let Some(evacuator) = &mut evacuator
            {
                evacuator.bring_back(heap, source);
            }
            service.give_back_surplus(heap, source);
        }
        let now = heap.space().usage();
        quiet = if now == before { quiet + 1 } else { 0 };
        before = now;
        source.publish(&heap.stats());
    }
}

extern "C" fn listener(heap: *mut c_void) -> *mut c_void {
    // SAFETY: `spawn` passed a heap that lives for ever.
    let heap: &'static Heap = unsafe { &*heap.cast::<Heap>() };
    let service = heap.service();
    let Some(source) = service.source() else {
        return null_mut();
    };
    let _ = rustix::thread::set_name(c"dcmalloc-hear");
    while service.is_running() {
        match source.next_event(Duration::from_secs(3600)) {
            Event::Granted {
                ranges,
                exhausted,
                last,
            } => {
                heap.space().lend(&ranges);
                if last {
                    heap.space().set_exhausted(exhausted);
                    service.asked.store(false, Ordering::Release);
                }
                if !ranges.is_empty() {
                    service.grants.fetch_add(1, Ordering::Relaxed);
                }
                heap.lent().raise();
            }
            Event::CapacityAvailable => {
                service.plenty.store(true, Ordering::Release);
                heap.space().set_exhausted(false);
                heap.lent().raise();
                heap.wanted().raise();
            }
            Event::Recall(recall) => {
                if let Some(free) = service
                    .recalls
                    .lock()
                    .iter_mut()
                    .find(|slot| slot.is_none())
                {
                    *free = Some(recall);
                }
                heap.wanted().raise();
            }
            Event::Timeout => {}
            Event::Closed => service.closed(heap),
        }
    }
    null_mut()
}
