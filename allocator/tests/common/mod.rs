//! A lender for tests: granules of a memfd, handed out in order.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use allocator::source::{Event, ExtentSource, Ranges, Recall, RecallOutcome, WindowRange};
use allocator::space::{GRANULE, keep_private};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};

#[derive(Default)]
struct State {
    free: BTreeSet<u64>,
    events: VecDeque<Event>,
    outcomes: Vec<(u64, RecallOutcome)>,
    /// Grants nothing while set.
    closed: bool,
}

/// A source over a memfd of `granules`.
pub(crate) struct MemfdSource {
    state: Mutex<State>,
    changed: Condvar,
    window: (usize, usize),
    _memory: OwnedFd,
}

impl MemfdSource {
    /// A source with all its granules free, for ever.
    pub(crate) fn leak(granules: usize) -> &'static Self {
        let len = granules * GRANULE;
        let memory = memfd_create("extents", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&memory, len as u64).unwrap();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let addr = unsafe {
            mmap(
                std::ptr::null_mut(),
                len,
                prot,
                MapFlags::SHARED,
                &memory,
                0,
            )
        }
        .unwrap();
        // SAFETY: the mapping just made.
        unsafe { keep_private(addr as usize, len) }.unwrap();
        let state = State {
            free: (0..granules as u64).map(|i| i * GRANULE as u64).collect(),
            ..State::default()
        };
        Box::leak(Box::new(Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            window: (addr as usize, len),
            _memory: memory,
        }))
    }

    /// Granules that nobody has.
    pub(crate) fn free_granules(&self) -> usize {
        self.state.lock().unwrap().free.len()
    }

    /// Sends an event to the heap.
    pub(crate) fn send(&self, event: Event) {
        self.state.lock().unwrap().events.push_back(event);
        self.changed.notify_all();
    }

    /// Stops or resumes granting.
    #[allow(dead_code, reason = "not every test stops it")]
    pub(crate) fn close(&self, yes: bool) {
        self.state.lock().unwrap().closed = yes;
    }

    /// Asks `bytes` back and waits for the answer.
    pub(crate) fn recall(&self, id: u64, bytes: u64) -> RecallOutcome {
        let deadline = Duration::from_secs(5);
        self.send(Event::Recall(Recall {
            id,
            bytes,
            deadline,
            ranges: Ranges::EMPTY,
        }));
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some((_, outcome)) = state.outcomes.iter().find(|(answered, _)| *answered == id)
            {
                return *outcome;
            }
            let waited = self
                .changed
                .wait_timeout(state, Duration::from_secs(10))
                .unwrap();
            assert!(!waited.1.timed_out(), "recall {id} was not answered");
            state = waited.0;
        }
    }
}

impl ExtentSource for MemfdSource {
    fn window(&self) -> (usize, usize) {
        self.window
    }

    fn request(&self, bytes: u64) -> bool {
        let mut state = self.state.lock().unwrap();
        let mut want = bytes as usize / GRANULE;
        if state.closed {
            want = 0;
        }
        let mut granted = 0;
        loop {
            let mut ranges = Ranges::EMPTY;
            while granted < want
                && let Some(offset) = state.free.first().copied()
                && ranges.push(WindowRange {
                    offset,
                    len: GRANULE as u64,
                })
            {
                state.free.remove(&offset);
                granted += 1;
            }
            let exhausted = state.free.is_empty() || state.closed;
            let last = granted >= want || exhausted;
            state.events.push_back(Event::Granted {
                ranges,
                exhausted,
                last,
            });
            if last {
                break;
            }
        }
        self.changed.notify_all();
        true
    }

    fn give_back(&self, ranges: &Ranges) -> bool {
        let mut state = self.state.lock().unwrap();
        for range in ranges.as_slice() {
            for step in 0..range.len / GRANULE as u64 {
                let offset = range.offset + step * GRANULE as u64;
                assert!(
                    state.free.insert(offset),
                    "granule {offset:#x} given back twice"
                );
                // SAFETY: given back, so nobody else reads or writes it.
                unsafe {
                    std::ptr::write_bytes((self.window.0 as u64 + offset) as *mut u8, 0, GRANULE)
                };
            }
        }
        state.events.push_back(Event::CapacityAvailable);
        self.changed.notify_all();
        true
    }

    fn answer(&self, id: u64, outcome: &RecallOutcome) -> bool {
        self.state.lock().unwrap().outcomes.push((id, *outcome));
        self.changed.notify_all();
        true
    }

    fn next_event(&self, timeout: Duration) -> Event {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some(event) = state.events.pop_front() {
                return event;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Event::Timeout;
            }
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
    }
}
