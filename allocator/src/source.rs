//! Where extents come from: the one trait through which the allocator asks
//! for capacity, and hears that it must give some back.
//!
//! The allocator knows nothing of CXL. A source lends *granules* (2 MiB) of a
//! *window*, one shared mapping that is made once; a range of it is named by
//! its offset. `dax-backend` has the source that talks to a broker, the tests
//! have one over a memfd.
#![forbid(unsafe_code)]

pub use crate::outcome::{RecallOutcome, Refusal, Refusals, Refused};
pub use crate::shared::SharedLease;
use crate::shared::{SharedError, SharedExtents};
use crate::stats::Stats;
use crate::tag::Tag;
use core::fmt;
use core::ops::Range;
use core::time::Duration;
use std::os::fd::BorrowedFd;

/// A run of granules in the window: both fields are bytes and multiples of
/// [`GRANULE`](crate::space::GRANULE).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WindowRange {
    /// Bytes from the start of the window.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// How many ranges one event carries at most; more arrive in further events.
pub const RANGES_PER_EVENT: usize = 28;

/// Ranges inline, so that no event needs the heap.
#[derive(Clone, Copy)]
pub struct Ranges {
    items: [WindowRange; RANGES_PER_EVENT],
    len: usize,
}

impl fmt::Debug for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}

impl Ranges {
    /// No range.
    pub const EMPTY: Self = Self {
        items: [WindowRange { offset: 0, len: 0 }; RANGES_PER_EVENT],
        len: 0,
    };

    /// Adds a range, extending the last one where they touch. `false`: full.
    pub fn push(&mut self, range: WindowRange) -> bool {
        if let Some(last) = self.items[..self.len].last_mut()
            && last.offset + last.len == range.offset
        {
            last.len += range.len;
            return true;
        }
        if self.len == RANGES_PER_EVENT {
            return false;
        }
        self.items[self.len] = range;
        self.len += 1;
        true
    }

    /// Whether a range that touches none of the others would find no room.
    pub fn is_full(&self) -> bool {
        self.len == RANGES_PER_EVENT
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The ranges, in the order they were pushed.
    pub fn as_slice(&self) -> &[WindowRange] {
        &self.items[..self.len]
    }

    /// Bytes in all ranges together.
    pub fn bytes(&self) -> u64 {
        self.as_slice().iter().map(|r| r.len).sum()
    }
}

/// Neighbouring granules of the heap whose content is that of neighbours in
/// the window. All in bytes, multiples of [`GRANULE`](crate::space::GRANULE).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SharedRun {
    /// The address of the first.
    pub addr: usize,
    /// Where its content is, from the start of the window.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

impl SharedRun {
    /// Its addresses.
    pub fn range(&self) -> Range<usize> {
        self.addr..self.addr + self.len
    }
}

/// What is heard of copies of what an ancestor left to a process.
#[allow(
    clippy::large_enum_variant,
    reason = "whoever hears it may not allocate, and looks at it at once"
)]
#[derive(Clone, Copy, Debug)]
pub enum Inherited {
    /// Nothing new.
    Nothing,
    /// It has copies of these, and they are ordinary memory.
    Filled(SharedRuns),
    /// Of everything.
    All,
}

/// From so many ancestors may a process have something.
pub const ANCESTORS: usize = 4;

/// How many runs come at once.
pub const RUNS_PER_EVENT: usize = 14;

/// Runs inline, so that nothing needs the heap.
#[derive(Clone, Copy, Debug)]
pub struct SharedRuns {
    items: [SharedRun; RUNS_PER_EVENT],
    len: usize,
}

impl SharedRuns {
    /// The first [`RUNS_PER_EVENT`] of some runs.
    pub fn new(runs: impl IntoIterator<Item = SharedRun>) -> Self {
        let mut items = [SharedRun::default(); RUNS_PER_EVENT];
        let mut len = 0;
        for (item, run) in items.iter_mut().zip(runs) {
            *item = run;
            len += 1;
        }
        Self { items, len }
    }

    /// The runs.
    pub fn as_slice(&self) -> &[SharedRun] {
        &self.items[..self.len]
    }
}

/// A lease asked back.
#[derive(Clone, Copy, Debug)]
pub struct Recall {
    /// Names the recall in its answer.
    pub id: u64,
    /// Bytes wanted back.
    pub bytes: u64,
    /// How long it may take.
    pub deadline: Duration,
    /// If not empty, just these ranges are wanted.
    pub ranges: Ranges,
    /// At the deadline the work goes on, instead of ending.
    pub past_deadline: bool,
    /// What is live stays, and is not refused: just what is unused is wanted,
    /// and what the program drops when it is asked to.
    pub unused_only: bool,
}

/// What a source tells the allocator.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// Granules are lent, and read as zeroes; possibly none.
    Granted {
        /// What is lent.
        ranges: Ranges,
        /// Under which tag it was asked for.
        tag: Tag,
        /// The source has no more of it at present.
        exhausted: bool,
        /// This is the last event that answers a request.
        last: bool,
    },
    /// A source that was exhausted has capacity again.
    CapacityAvailable,
    /// The machine is short of DRAM: what lies there for want of extents is to
    /// move to some as fast as it can, and freed pages are to go.
    DramShort,
    /// Give back.
    Recall(Recall),
    /// The memory of these granules is gone: the device has taken it. There is
    /// nothing to copy and nothing to answer. They count as lent until they
    /// are given back, which says that nothing maps them any more.
    Lost(Ranges),
    /// Nothing happened in the time given.
    Timeout,
    /// The source can't be reached, and [`ExtentSource::next_event`] tries to:
    /// what it lent stays lent, what was asked of it is not answered. An empty
    /// [`Event::Granted`] says that it is back.
    Disconnected,
    /// The source is gone; what it lent stays lent.
    Closed,
}

/// A lender of extents.
///
/// `request`, `give_back`, `answer` and what is about forks are called from one thread of the
/// allocator, `next_event` from another. None of them may allocate from the
/// heap that they serve, and none is called with a lock of the allocator held.
pub trait ExtentSource: Sync {
    /// Address and length of the window's mapping: shared, readable and
    /// writable, never inherited by a child (`MADV_DONTFORK`), valid for ever.
    fn window(&self) -> (usize, usize);

    /// Whether the window is a device's file (`/dev/daxX.Y`), which may be mapped in huge pages only.
    fn window_is_device(&self) -> bool {
        false
    }

    /// Called on the allocator's own thread before anything else is called: a
    /// program may close descriptors that it doesn't know (close_range(2)), so
    /// a source moves its own into a table of that thread's own here.
    fn adopt_thread(&self) {}

    /// Called after `adopt_thread`, on the thread that attached the source, to
    /// close there what the allocator's thread has now.
    fn thread_adopted(&self) {}

    /// A descriptor of `/dev/userfaultfd`, where the source has one to lend: it
    /// gives an unprivileged process the right to have the kernel's own
    /// accesses wait (userfaultfd(2)). Asked for after `adopt_thread`.
    fn userfaultfd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// What the heap looks like; now and then, and when the process ends.
    fn publish(&self, _stats: &Stats) {}

    /// Asks for `bytes` more with this tag. The answer is one or more
    /// [`Event::Granted`]. `false`: the source is gone.
    fn request(&self, bytes: u64, tag: Tag) -> bool;

    /// Returns granules; their content is of no further use to anyone.
    fn give_back(&self, ranges: &Ranges) -> bool;

    /// Says what came of a recall; ends it, unless `outcome.more`.
    fn answer(&self, id: u64, outcome: &RecallOutcome) -> bool;

    /// Asks the source to serve this process's forks with a new userfaultfd:
    /// to hear of every child and grandchild, and to give each a copy of what
    /// it touches and was shared. `false`: it can't, and the heap is moved off
    /// extents before each fork.
    /// `mark` is the address of a page that is registered with it: to each
    /// child it shows what names it, for [`ExtentSource::join_family`].
    fn serve_forks(&self, _userfaultfd: BorrowedFd<'_>, _mark: usize) -> bool {
        false
    }

    /// Asks to hear when this process has copies of what ancestor `line` left
    /// it, which knows it by `name`. `false`: nobody says so.
    fn join_family(&self, _line: u8, _name: [u64; 2]) -> bool {
        false
    }

    /// What there is to hear from there. Does not wait.
    fn inherited(&self, _line: u8) -> Inherited {
        Inherited::Nothing
    }

    /// A fork is near. `filled` hears of what [`ExtentSource::filled`] would
    /// have said; nothing more until [`ExtentSource::fork_end`]. `false`:
    /// forks are not served any more.
    fn fork_begin(&self, _filled: &mut dyn FnMut(&SharedRuns)) -> bool {
        false
    }

    /// What is covered by placeholders, and no lease from now on: `next` gives
    /// the first run at an address or after it. Children may be made when this
    /// returns. `false`: refused, all of it.
    fn fork_share(&self, _next: &dyn Fn(usize) -> Option<SharedRun>) -> bool {
        false
    }

    /// The child is made, or is not.
    fn fork_end(&self) {}

    /// Takes some of what was shared back, as leases, of which nobody else needs
    /// the original: the caller puts it in place, and says so by
    /// [`ExtentSource::fork_taken`]. It is at address `from` or after it, and
    /// `may` says of each part whether it may be put there; `from` becomes where
    /// to go on. May be none; `None`: there is nothing, or not now. `filled` as
    /// above.
    fn fork_take(
        &self,
        _from: &mut usize,
        _may: &dyn Fn(&SharedRun) -> bool,
        _filled: &mut dyn FnMut(&SharedRuns),
    ) -> Option<SharedRuns> {
        None
    }

    /// What [`ExtentSource::fork_take`] gave is in place.
    fn fork_taken(&self) {}

    /// Some of what was shared of which this process has its own copy now, in
    /// DRAM, and on which nobody waits any more. Does not wait.
    fn filled(&self) -> Option<SharedRuns> {
        None
    }

    /// Waits for the next event.
    fn next_event(&self, timeout: Duration) -> Event;

    /// Maps the capacity with this tag, which others share, to be read. Called
    /// from any thread of the program, and may allocate.
    ///
    /// # Errors
    /// [`SharedError`]: nothing is mapped.
    fn open_shared(&self, _tag: Tag) -> Result<SharedExtents, SharedError> {
        Err(SharedError::Refused(
            "this lender has nothing to share".into(),
        ))
    }
}
