//! Calling the program: under pressure, and when something was lost.
//!
//! Callbacks are the program's code and data, which may lie on extents, so
//! they run on threads of their own: one for pressure, one for losses, since
//! the first may block for as long as it likes. The heap's threads leave a
//! note in static memory; for pressure the worker waits for a bounded time.

use core::ffi::c_void;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use core::time::Duration;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use rustix::io::Errno;

use super::slot::{SLOTS, Slot, table};
use super::threads;
use crate::heap::Heap;
use crate::source::{Ranges, Recall};
use crate::sync::{Lock, Signal};
use crate::thread::{self, spawn};

/// As much as a program's first thread has: it runs the program's code.
const STACK: usize = 8 << 20;

/// Extents are recalled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pressure {
    /// Bytes that are still missing.
    pub bytes: u64,
    /// For how long dropping is of use; what is live then is moved.
    pub within: Duration,
}

/// Content of an arena was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Lost {
    /// Bytes of granules that read as zeroes now, since the last call.
    pub bytes: u64,
}

type OnPressure = Arc<dyn Fn(&Pressure) + Send + Sync>;
type OnLost = Arc<dyn Fn(&Lost) + Send + Sync>;

/// What the program said about an arena. Not for the heap's own threads.
pub(crate) struct Told {
    pub(super) name: String,
    pub(super) priority: i32,
    pub(super) pressure: Option<OnPressure>,
    pub(super) lost: Option<OnLost>,
}

impl Told {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            priority: 0,
            pressure: None,
            lost: None,
        }
    }
}

/// A recall that callbacks are to help with.
#[derive(Clone, Copy)]
struct Ask {
    heap: &'static Heap,
    bytes: u64,
    until: Instant,
    ranges: Ranges,
}

/// What a thread calls the program for.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Pressure,
    Loss,
}

/// What the heap's threads and those of callbacks share.
pub(crate) struct Callbacks {
    /// The thread is there, by [`Kind`].
    running: [AtomicBool; 2],
    /// It has ever been needed.
    needed: [AtomicBool; 2],
    ask: Lock<Option<Ask>>,
    /// The thread is at work on an ask.
    busy: AtomicBool,
    /// Bytes lost of each arena that its owner has not been told of.
    lost: [AtomicU64; SLOTS],
    /// Raised for the thread, by [`Kind`].
    called: [Signal; 2],
    /// Raised by the thread.
    done: Signal,
    /// Callbacks that panicked.
    panics: AtomicU64,
}

static CALLBACKS: Callbacks = Callbacks {
    running: [const { AtomicBool::new(false) }; 2],
    needed: [const { AtomicBool::new(false) }; 2],
    ask: Lock::new(None),
    busy: AtomicBool::new(false),
    lost: [const { AtomicU64::new(0) }; SLOTS],
    called: [const { Signal::new() }; 2],
    done: Signal::new(),
    panics: AtomicU64::new(0),
};

pub(crate) fn callbacks() -> &'static Callbacks {
    &CALLBACKS
}

impl Callbacks {
    /// Starts a thread, if it is not there. Not from inside `malloc`.
    pub(super) fn start(&'static self, kind: Kind) -> Result<(), Errno> {
        let running = &self.running[kind as usize];
        if running.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        let main = match kind {
            Kind::Pressure => press,
            Kind::Loss => tell_losses,
        };
        spawn(main, null_mut(), STACK).inspect_err(|_| running.store(false, Ordering::Release))?;
        self.needed[kind as usize].store(true, Ordering::Release);
        Ok(())
    }

    /// In a child that gets threads: starts those that its parent had.
    pub(crate) fn start_again(&'static self) -> Result<(), Errno> {
        for kind in [Kind::Pressure, Kind::Loss] {
            if self.needed[kind as usize].load(Ordering::Acquire) {
                self.start(kind)?;
            }
        }
        Ok(())
    }

    /// Has the program drop what it can, by priority; returns when that is
    /// enough, all have been asked, or the time is over.
    pub(crate) fn press(&self, heap: &'static Heap, recall: &Recall, within: Duration) {
        let until = Instant::now() + within;
        // One that blocks is not waited for twice.
        let running = &self.running[Kind::Pressure as usize];
        if !running.load(Ordering::Acquire) || self.busy.swap(true, Ordering::AcqRel) {
            return;
        }
        *self.ask.lock() = Some(Ask {
            heap,
            bytes: recall.bytes,
            until,
            ranges: recall.ranges,
        });
        self.called[Kind::Pressure as usize].raise();
        loop {
            let seen = self.done.read();
            let left = until.saturating_duration_since(Instant::now());
            let waits = self.busy.load(Ordering::Acquire) && !heap.service().is_to_stop();
            if !waits || left.is_zero() {
                return;
            }
            self.done.wait(seen, left);
        }
    }

    /// A fork waits for the worker, which may wait for a callback.
    pub(crate) fn fork_waits(&self) {
        self.done.raise();
    }

    /// Has the owner of an arena told that content of it was lost, if it wants
    /// to hear.
    pub(super) fn tell_lost(&self, slot: usize, bytes: u64) {
        self.lost[slot].fetch_add(bytes, Ordering::AcqRel);
        self.called[Kind::Loss as usize].raise();
    }

    /// Another arena has that place now.
    pub(super) fn forget_lost(&self, slot: usize) {
        self.lost[slot].store(0, Ordering::Relaxed);
    }

    /// Owners are told of losses.
    pub(super) fn tells_losses(&self) -> bool {
        self.running[Kind::Loss as usize].load(Ordering::Acquire)
    }

    /// How many callbacks panicked.
    pub(crate) fn panics(&self) -> u64 {
        self.panics.load(Ordering::Relaxed)
    }

    /// In a child, which has no such thread.
    pub(crate) fn forget(&self) {
        for running in &self.running {
            running.store(false, Ordering::Release);
        }
        for lost in &self.lost {
            lost.store(0, Ordering::Relaxed);
        }
        self.busy.store(false, Ordering::Release);
        // SAFETY: the child has one thread, and it does not hold it.
        unsafe { self.ask.force_unlock() };
        *self.ask.lock() = None;
    }

    fn run(&self, callback: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(callback)).is_err() {
            self.panics.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn carry_out(&self, ask: &Ask) {
        let mut told = Vec::new();
        for slot in table().open_slots() {
            if let Some(Told {
                priority,
                pressure: Some(callback),
                ..
            }) = &*slot.told.lock()
            {
                told.push((*priority, slot, slot.generation(), Arc::clone(callback)));
            }
        }
        told.sort_by_key(|(priority, ..)| *priority);
        for (_, slot, generation, callback) in told {
            let within = ask.until.saturating_duration_since(Instant::now());
            let idle = ask.heap.space().idle_bytes_in(ask.ranges.as_slice());
            let bytes = ask.bytes.saturating_sub(idle);
            if bytes == 0 || within.is_zero() {
                return;
            }
            self.run(|| callback(&Pressure { bytes, within }));
            give_back(ask.heap, slot, generation);
        }
    }

    fn tell(&self, slot: &'static Slot) {
        let bytes = self.lost[slot.index()].swap(0, Ordering::AcqRel);
        let callback = match &*slot.told.lock() {
            Some(told) if bytes > 0 => told.lost.clone(),
            _ => None,
        };
        if let Some(callback) = callback {
            self.run(|| callback(&Lost { bytes }));
        }
    }
}

/// Makes free pages what a callback freed.
fn give_back(heap: &Heap, slot: &'static Slot, generation: u32) {
    if slot.generation() == generation {
        threads::flush(slot);
    }
    heap.purge_extents();
}

extern "C" fn press(_: *mut c_void) -> *mut c_void {
    let _ = rustix::thread::set_name(c"dcmalloc-call");
    thread::hear_faults();
    let callbacks = callbacks();
    let called = &callbacks.called[Kind::Pressure as usize];
    loop {
        let seen = called.read();
        let ask = callbacks.ask.lock().take();
        if let Some(ask) = ask {
            callbacks.carry_out(&ask);
            callbacks.busy.store(false, Ordering::Release);
            callbacks.done.raise();
            continue;
        }
        called.wait(seen, Duration::from_secs(3600));
    }
}

extern "C" fn tell_losses(_: *mut c_void) -> *mut c_void {
    let _ = rustix::thread::set_name(c"dcmalloc-lost");
    thread::hear_faults();
    let callbacks = callbacks();
    let called = &callbacks.called[Kind::Loss as usize];
    loop {
        let seen = called.read();
        table().open_slots().for_each(|slot| callbacks.tell(slot));
        called.wait(seen, Duration::from_secs(3600));
    }
}
