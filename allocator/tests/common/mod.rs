//! A lender for tests: granules of a memfd, handed out in order.
#![allow(dead_code, reason = "no test uses all of it")]

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use allocator::source::{
    Event, ExtentSource, RANGES_PER_EVENT, Ranges, Recall, RecallOutcome, WindowRange,
};
use allocator::space::{GRANULE, keep_private};
use allocator::{Heap, Tag};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};

#[derive(Default)]
struct State {
    free: BTreeSet<u64>,
    events: VecDeque<Event>,
    outcomes: Vec<(u64, RecallOutcome)>,
    /// Grants nothing while set.
    closed: bool,
    /// Not granted while they are in here.
    withheld: Vec<WindowRange>,
    /// Taken by force, and not given back yet.
    gone: BTreeSet<u64>,
    /// From these offsets on granules have these tags; the last one first.
    tagged: Vec<(u64, Tag)>,
}

impl State {
    fn is_withheld(&self, offset: u64) -> bool {
        let inside = |r: &WindowRange| offset >= r.offset && offset - r.offset < r.len;
        self.withheld.iter().any(inside)
    }

    /// The tag of the granule at `offset`.
    fn tag_of(&self, offset: u64) -> Tag {
        let tagged = self.tagged.iter().find(|(from, _)| offset >= *from);
        tagged.map_or(Tag::NONE, |(_, tag)| *tag)
    }

    /// The first granule with this tag that may be granted.
    fn next_free_of(&self, tag: Tag) -> Option<u64> {
        let mut free = self.free.iter().copied();
        free.find(|offset| {
            !self.closed && !self.is_withheld(*offset) && self.tag_of(*offset) == tag
        })
    }
}

/// How long anything may take, unless a test says so.
const PATIENCE: Duration = Duration::from_secs(20);

/// xorshift64*: any spread will do.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }
}

/// Whether the heap can move what is live; if not, says why the test is
/// skipped.
pub(crate) fn moves(heap: &Heap) -> bool {
    let moves = heap.stats().moves_live;
    if !moves {
        println!(
            "SKIPPED: no userfaultfd that blocks the kernel's own accesses (it takes \
             CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1 or access to /dev/userfaultfd)"
        );
    }
    moves
}

/// Waits until `done`, and says for how long that was.
pub(crate) fn wait_for(heap: &Heap, what: &str, mut done: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", heap.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    begun.elapsed()
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

    /// From granule `first` on all have this tag.
    pub(crate) fn tag_from(&self, first: usize, tag: Tag) {
        let mut state = self.state.lock().unwrap();
        state.tagged.insert(0, ((first * GRANULE) as u64, tag));
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
    pub(crate) fn close(&self, yes: bool) {
        self.state.lock().unwrap().closed = yes;
    }

    /// Asks `bytes` back and waits for the answer.
    pub(crate) fn recall(&self, id: u64, bytes: u64) -> RecallOutcome {
        self.ask_back(id, bytes, Ranges::EMPTY, PATIENCE)
    }

    /// Asks for up to `bytes` of what is unused or can be dropped.
    pub(crate) fn thin(&self, id: u64, bytes: u64) -> RecallOutcome {
        self.send(Event::Recall(Recall {
            id,
            bytes,
            deadline: PATIENCE,
            ranges: Ranges::EMPTY,
            past_deadline: false,
            unused_only: true,
        }));
        self.outcome(id, PATIENCE)
    }

    /// Grants nothing of some ranges from now on. What is given back is no news
    /// to the heap meanwhile.
    pub(crate) fn withhold(&self, ranges: &Ranges) {
        self.state.lock().unwrap().withheld = ranges.as_slice().to_vec();
    }

    /// Asks for all of some ranges, and grants nothing of them from now on.
    pub(crate) fn recall_ranges(&self, id: u64, ranges: &Ranges) -> RecallOutcome {
        self.withhold(ranges);
        self.ask_back(id, ranges.bytes(), *ranges, PATIENCE)
    }

    /// Ends what [`Self::withhold`] began: there is capacity again.
    pub(crate) fn restore(&self) {
        self.state.lock().unwrap().withheld.clear();
        self.send(Event::CapacityAvailable);
    }

    /// Random ranges that hold at least `granules` of those lent, or all.
    pub(crate) fn some_lent(&self, granules: usize, random: &mut Random) -> Ranges {
        let state = self.state.lock().unwrap();
        let all = self.window.1 / GRANULE;
        let lent = |index: &usize| !state.free.contains(&((index * GRANULE) as u64));
        let mut picked = BTreeSet::new();
        let (mut count, mut pieces) = (0, 0);
        while count < granules && pieces < RANGES_PER_EVENT {
            pieces += 1;
            // The last one takes what is missing.
            let most = if pieces == RANGES_PER_EVENT { all } else { 12 };
            let first = random.below(all);
            for index in (first..all).chain(0..first).take(1 + random.below(most)) {
                if picked.insert(index) {
                    count += usize::from(lent(&index));
                }
            }
        }
        let mut ranges = Ranges::EMPTY;
        for index in picked {
            ranges.push(WindowRange {
                offset: (index * GRANULE) as u64,
                len: GRANULE as u64,
            });
        }
        ranges
    }

    /// Takes the granules of some ranges that are lent, by force; says which.
    pub(crate) fn take_by_force(&self, ranges: &[WindowRange]) -> Ranges {
        let mut guard = self.state.lock().unwrap();
        let state = &mut *guard;
        let mut gone = Ranges::EMPTY;
        let granules = ranges
            .iter()
            .flat_map(|r| (r.offset..r.offset + r.len).step_by(GRANULE));
        for offset in granules.filter(|offset| !state.free.contains(offset)) {
            let len = GRANULE as u64;
            if gone.push(WindowRange { offset, len }) {
                state.gone.insert(offset);
            }
        }
        state.events.push_back(Event::Lost(gone));
        self.changed.notify_all();
        gone
    }

    /// Granules that were taken by force and not let go of yet.
    pub(crate) fn gone_granules(&self) -> usize {
        self.state.lock().unwrap().gone.len()
    }

    /// Granules of some ranges that are lent.
    pub(crate) fn lent_of(&self, ranges: &Ranges) -> usize {
        let state = self.state.lock().unwrap();
        let offsets = ranges
            .as_slice()
            .iter()
            .flat_map(|r| (r.offset..r.offset + r.len).step_by(GRANULE));
        offsets
            .filter(|offset| !state.free.contains(offset))
            .count()
    }

    /// Asks `bytes` back without any time, but past the deadline; what came
    /// at the deadline, and what came of the rest.
    pub(crate) fn recall_past_deadline(&self, id: u64, bytes: u64) -> [RecallOutcome; 2] {
        self.send(Event::Recall(Recall {
            id,
            bytes,
            deadline: Duration::ZERO,
            ranges: Ranges::EMPTY,
            past_deadline: true,
            unused_only: false,
        }));
        let end = Instant::now() + PATIENCE;
        loop {
            let state = self.state.lock().unwrap();
            let of_it = state
                .outcomes
                .iter()
                .filter(|(answered, _)| *answered == id);
            let outcomes: Vec<RecallOutcome> = of_it.map(|(_, outcome)| *outcome).collect();
            if let [first, last] = outcomes[..] {
                return [first, last];
            }
            assert!(Instant::now() < end, "recall {id}: {outcomes:?}");
            drop(state);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Asks for `bytes` of some ranges, of any if there are none, and waits
    /// for the answer.
    pub(crate) fn ask_back(
        &self,
        id: u64,
        bytes: u64,
        ranges: Ranges,
        deadline: Duration,
    ) -> RecallOutcome {
        self.send(Event::Recall(Recall {
            id,
            bytes,
            deadline,
            ranges,
            past_deadline: false,
            unused_only: false,
        }));
        self.outcome(id, deadline)
    }

    /// Waits for the answer to a recall.
    fn outcome(&self, id: u64, deadline: Duration) -> RecallOutcome {
        let mut state = self.state.lock().unwrap();
        loop {
            if let Some((_, outcome)) = state.outcomes.iter().find(|(answered, _)| *answered == id)
            {
                return *outcome;
            }
            let waited = self
                .changed
                .wait_timeout(state, deadline + PATIENCE)
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

    fn request(&self, bytes: u64, tag: Tag) -> bool {
        let mut state = self.state.lock().unwrap();
        let want = bytes as usize / GRANULE;
        let mut granted = 0;
        loop {
            let mut ranges = Ranges::EMPTY;
            while granted < want
                && let Some(offset) = state.next_free_of(tag)
                && ranges.push(WindowRange {
                    offset,
                    len: GRANULE as u64,
                })
            {
                state.free.remove(&offset);
                granted += 1;
            }
            let exhausted = state.next_free_of(tag).is_none();
            let last = granted >= want || exhausted;
            state.events.push_back(Event::Granted {
                ranges,
                tag,
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
                // What was taken by force is offered anew at once.
                state.gone.remove(&offset);
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
        if state.withheld.is_empty() {
            state.events.push_back(Event::CapacityAvailable);
        }
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
