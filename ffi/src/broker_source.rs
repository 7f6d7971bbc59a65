//! Extents lent by a broker, as the allocator wants them.
//!
//! The socket lives in the descriptor table of the allocator's worker thread
//! alone: a program that closes what it doesn't know (daemons do, with
//! close_range(2)) closes nothing of ours, and one that polls or passes on its
//! descriptors never sees it. The window is mapped once, whole; its descriptor
//! is closed before the program runs.

use core::ffi::CStr;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use allocator::source::{
    ANCESTORS, Event, ExtentSource, Inherited, RANGES_PER_EVENT, Ranges, Recall, RecallOutcome,
    Refusal, SharedLease, SharedRun, SharedRuns, WindowRange,
};
use allocator::space::keep_private;
use allocator::stats::Stats;
use allocator::{SharedError, SharedExtents, SpillState, Tag};
use dax_backend::broker::client::{
    ConnectError, FamilyLine, ForkLine, Heard, SharedRuns as WireRuns, Welcome,
};
use dax_backend::broker::client_page::{
    DEGRADED_CONFIG, DEGRADED_DISCONNECTED, DEGRADED_EXHAUSTED, DEGRADED_FOREIGN,
    DEGRADED_NO_REBIND, DEGRADED_NO_RING, DEGRADED_NO_SPILL, DEGRADED_USER_MOVES,
};
use dax_backend::broker::protocol::{
    RefusalReason, SharedRun as WireRun, WindowRange as WireRange,
};
use dax_backend::broker::{
    BrokerClient, ClientPageMapping, FromBroker, RecallOutcome as WireOutcome, SharedMapping,
    SharedOpenError, StallTimes,
};
use dax_backend::extent::ExtentTag;
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap};

use crate::rejoin::Rejoin;

/// A connection to a broker, and the window that its leases lie in.
pub struct BrokerSource {
    client: BrokerClient,
    page: ClientPageMapping,
    window: (usize, usize),
    /// Whether the window is `/dev/daxX.Y`.
    is_device: bool,
    userfaultfd: Option<OwnedFd>,
    /// The `dcm run` that this process belongs to.
    run: u128,
    /// Where the worker speaks around forks.
    line: OnceLock<ForkLine>,
    /// Where it hears of what it inherited.
    ancestors: [OnceLock<FamilyLine>; ANCESTORS],
    /// The worker has a descriptor table of its own.
    apart: AtomicBool,
    rejoin: Rejoin,
}

/// Why there is no source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The window could not be mapped: no address space (`RLIMIT_AS`), or the
    /// device refused.
    #[error("mapping the broker's window failed: {0}")]
    Window(Errno),
    /// A process has one heap on extents.
    #[error("a heap of this process has a broker already")]
    Attached,
}

impl BrokerSource {
    /// Connects to the broker at `path` and maps its window. `run` names the
    /// `dcm run` that this process belongs to; 0: none. Allocates nothing.
    ///
    /// # Errors
    /// No broker, one that can't be trusted, one of another version, or no
    /// address space.
    pub fn connect(path: &CStr, run: u128) -> Result<Self, SourceError> {
        let (client, welcome) = BrokerClient::connect(path, run)?;
        let window = map_window(&welcome).map_err(SourceError::Window)?;
        let page = welcome.page;
        page.pid
            .store(u64::from(std::process::id()), Ordering::Relaxed);
        let userfaultfd = welcome.userfaultfd;
        let rejoin = Rejoin::new(path, welcome.client_id, welcome.window_len);
        let rejoin = rejoin.map_err(SourceError::Window)?;
        Ok(Self {
            client,
            page,
            window,
            is_device: is_device(&welcome.window),
            userfaultfd,
            run,
            line: OnceLock::new(),
            ancestors: [const { OnceLock::new() }; ANCESTORS],
            apart: AtomicBool::new(false),
            rejoin,
        })
    }
}

impl BrokerSource {
    /// As [`Self::connect`], on a thread that is given a descriptor table of
    /// its own first: the program never sees a descriptor of it.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn connect_apart(path: &CStr, run: u128) -> Result<Self, SourceError> {
        let apart = close_range(0, libc::c_uint::MAX, CLOSE_RANGE_UNSHARE);
        let source = Self::connect(path, run)?;
        source.apart.store(apart, Ordering::Release);
        Ok(source)
    }
}

/// Shared capacity of a broker, as the allocator holds it.
struct Shared(SharedMapping);

impl SharedLease for Shared {
    fn bytes(&self) -> NonNull<[u8]> {
        self.0.bytes()
    }

    fn is_lost(&self) -> bool {
        self.0.is_lost()
    }
}

/// Whether `file` is a device's; if nobody can tell, it is not.
fn is_device(file: &OwnedFd) -> bool {
    let stat = rustix::fs::fstat(file);
    stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice)
}

fn map_window(welcome: &Welcome) -> Result<(usize, usize), Errno> {
    let len = welcome.window_len as usize;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    // Aligned, so that the kernel can map 2 MiB with one entry.
    let granule = welcome.granule as usize;
    // SAFETY: a new reservation at an address of the kernel's choice.
    let raw = unsafe {
        rustix::mm::mmap_anonymous(
            core::ptr::null_mut(),
            len + granule,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }? as usize;
    let addr = raw.next_multiple_of(granule);
    // SAFETY: inside the reservation just made, which nobody else uses.
    unsafe {
        mmap(
            addr as *mut _,
            len,
            prot,
            flags | MapFlags::FIXED,
            &welcome.window,
            welcome.window_base,
        )
    }?;
    // SAFETY: the mapping just made.
    unsafe { keep_private(addr, len) }?;
    Ok((addr, len))
}

impl ExtentSource for BrokerSource {
    fn window(&self) -> (usize, usize) {
        self.window
    }

    fn window_is_device(&self) -> bool {
        self.is_device
    }

    fn adopt_thread(&self) {
        let socket = self.client.fd().as_raw_fd();
        let other = self.userfaultfd.as_ref().map_or(socket, AsRawFd::as_raw_fd);
        self.apart
            .store(own_table(socket, other), Ordering::Release);
    }

    fn thread_adopted(&self) {
        if !self.apart.load(Ordering::Acquire) {
            return;
        }
        let ours = [Some(self.client.fd()), self.userfaultfd()];
        for descriptor in ours.into_iter().flatten() {
            // SAFETY: this closes the number in the caller's table only; the
            // worker, which alone uses it from now on, has it in its own.
            unsafe { rustix::io::close(descriptor.as_raw_fd()) };
        }
    }

    fn userfaultfd(&self) -> Option<BorrowedFd<'_>> {
        self.userfaultfd.as_ref().map(AsFd::as_fd)
    }

    fn request(&self, bytes: u64, tag: Tag) -> bool {
        let asked = self
            .client
            .request_tagged_lease(bytes, ExtentTag(tag.to_bytes()));
        // Whoever hears the broker notices when it is gone.
        asked.is_ok() || self.apart.load(Ordering::Acquire)
    }

    fn open_shared(&self, tag: Tag) -> Result<SharedExtents, SharedError> {
        let path = self.rejoin.path().ok_or(SharedError::NoLender)?;
        let mapping = SharedMapping::open(path, self.run, ExtentTag(tag.to_bytes()));
        let mapping = mapping.map_err(|error| match error {
            SharedOpenError::Refused(code) => SharedError::Refused(code.to_string().into()),
            other => SharedError::Failed(other.to_string()),
        })?;
        // SAFETY: mapped until it is dropped; that nobody writes is the
        // promise of who called `Arena::open_shared`.
        Ok(unsafe { SharedExtents::new(Box::new(Shared(mapping))) })
    }

    fn give_back(&self, ranges: &Ranges) -> bool {
        let (wire, count) = (to_wire(ranges), ranges.as_slice().len());
        self.rejoin.give_back(&self.client, &wire[..count])
    }

    fn answer(&self, id: u64, outcome: &RecallOutcome) -> bool {
        for refused in outcome.refused.iter() {
            let wire = to_wire(&refused.ranges);
            let ranges = &wire[..refused.ranges.as_slice().len()];
            let reason = reason(refused.reason);
            let said = self.client.refuse_recall(id, reason, refused.bytes, ranges);
            if said.is_err() {
                return false;
            }
        }
        let stalls = &outcome.stalls;
        let outcome = WireOutcome {
            idle: outcome.idle,
            purged: outcome.purged,
            dropped: outcome.dropped,
            to_extents: outcome.to_extents,
            to_dram: outcome.to_dram,
            spilled: outcome.spilled,
            copied: outcome.copied,
            moving_us: outcome.moving.as_micros() as u64,
            stalls: StallTimes {
                count: stalls.count,
                p50: stalls.p50,
                p99: stalls.p99,
                max: stalls.max,
            },
            more: outcome.more,
        };
        self.client.answer_recall(id, &outcome).is_ok()
    }

    fn serve_forks(&self, userfaultfd: BorrowedFd<'_>, mark: usize) -> bool {
        // In the program's table it could be closed, and its number reused.
        if !self.apart.load(Ordering::Acquire) {
            return false;
        }
        let line = self.client.serve_forks(userfaultfd, mark as u64);
        line.is_ok_and(|line| self.line.set(line).is_ok())
    }

    fn join_family(&self, line: u8, name: [u64; 2]) -> bool {
        let slot = self.ancestors.get(usize::from(line));
        let joined = self.client.join_family(name);
        slot.is_some_and(|slot| joined.is_ok_and(|joined| slot.set(joined).is_ok()))
    }

    fn inherited(&self, line: u8) -> Inherited {
        let slot = self.ancestors.get(usize::from(line));
        let heard = slot.and_then(OnceLock::get).map(FamilyLine::heard);
        match heard {
            None | Some(Heard::Nothing) => Inherited::Nothing,
            Some(Heard::Filled(runs)) => Inherited::Filled(shared(&runs)),
            Some(Heard::All) => Inherited::All,
        }
    }

    fn fork_begin(&self, filled: &mut dyn FnMut(&SharedRuns)) -> bool {
        let line = self.line.get();
        line.is_some_and(|line| line.begin(&mut |runs| filled(&shared(runs))).is_ok())
    }

    fn fork_share(&self, next: &dyn Fn(usize) -> Option<SharedRun>) -> bool {
        let next_wire = |from: u64| {
            next(from as usize).map(|run| WireRun {
                addr: run.addr as u64,
                offset: run.offset,
                len: run.len as u64,
            })
        };
        let line = self.line.get();
        if line.is_none_or(|line| line.share(&next_wire).is_err()) {
            return false;
        }
        // Only now: a broker that comes next is told of what is still a lease.
        let mut from = 0;
        while let Some(run) = next_wire(from) {
            self.rejoin.leases.remove(run.window());
            from = run.addr + run.len;
        }
        true
    }

    fn fork_end(&self) {
        if let Some(line) = self.line.get() {
            let _ = line.end();
        }
    }

    fn fork_take(
        &self,
        from: &mut usize,
        may: &dyn Fn(&SharedRun) -> bool,
        filled: &mut dyn FnMut(&SharedRuns),
    ) -> Option<SharedRuns> {
        let line = self.line.get()?;
        let filled = &mut |runs: &WireRuns| filled(&shared(runs));
        let offered = line.offered(*from as u64, filled).ok()?;
        let (wanted, next) = offered.choose(&|run| may(&from_wire_run(run)));
        *from = next? as usize;
        let _held = self.rejoin.hold_takes();
        // First: a broker that comes next may have booked it already.
        for run in wanted.as_slice() {
            self.rejoin.leases.add(run.window());
        }
        if line.take(&wanted, filled).is_err() {
            for run in wanted.as_slice() {
                self.rejoin.leases.remove(run.window());
            }
            return None;
        }
        Some(shared(&wanted))
    }

    fn fork_taken(&self) {
        if let Some(line) = self.line.get() {
            let _ = line.taken();
        }
    }

    fn filled(&self) -> Option<SharedRuns> {
        self.line.get()?.filled().map(|runs| shared(&runs))
    }

    fn next_event(&self, timeout: Duration) -> Event {
        if !self.rejoin.is_here() {
            let socket = self.client.fd().as_raw_fd();
            return self.rejoin.next_event(socket, &self.page, timeout);
        }
        match self.client.recv(Some(timeout)) {
            Ok(None) => Event::Timeout,
            Ok(Some(FromBroker::Grant {
                ranges,
                tag,
                exhausted,
                last,
            })) => {
                for range in ranges.as_slice() {
                    self.rejoin.leases.add(*range);
                }
                Event::Granted {
                    ranges: from_wire(ranges.as_slice()),
                    tag: Tag::from_bytes(tag.0),
                    exhausted,
                    last,
                }
            }
            Ok(Some(FromBroker::CapacityAvailable)) => Event::CapacityAvailable,
            Ok(Some(FromBroker::DramShort)) => Event::DramShort,
            Ok(Some(FromBroker::Recall {
                ranges, lost: true, ..
            })) => Event::Lost(from_wire(ranges.as_slice())),
            Ok(Some(FromBroker::Recall {
                id,
                bytes,
                deadline,
                ranges,
                past_deadline,
                unused,
                ..
            })) => Event::Recall(Recall {
                id,
                bytes,
                deadline,
                ranges: from_wire(ranges.as_slice()),
                past_deadline,
                unused_only: unused,
            }),
            Err(_) if self.apart.load(Ordering::Acquire) => self.rejoin.lost(),
            // The socket's number may be the program's by now.
            Err(_) => {
                self.rejoin.lost();
                Event::Closed
            }
        }
    }

    fn publish(&self, stats: &Stats) {
        let usage = stats.usage;
        let degraded = [
            (stats.exhausted > 0, DEGRADED_EXHAUSTED),
            (!stats.moves_live, DEGRADED_NO_REBIND),
            (stats.user_moves, DEGRADED_USER_MOVES),
            (stats.unknown_settings > 0, DEGRADED_CONFIG),
            (stats.foreign > 0, DEGRADED_FOREIGN),
            (stats.spill == SpillState::Unusable, DEGRADED_NO_SPILL),
            (stats.spill == SpillState::NoRing, DEGRADED_NO_RING),
            (!self.rejoin.is_here(), DEGRADED_DISCONNECTED),
        ];
        let flags = degraded
            .iter()
            .filter(|(is, _)| *is)
            .fold(0, |all, (_, flag)| all | flag);
        let page = &*self.page;
        let granule = allocator::space::GRANULE as u64;
        let dram_live = usage.dram_live + stats.outside;
        for (counter, value) in [
            (&page.extent_live_bytes, usage.extent_live),
            (&page.extent_held_bytes, usage.extent_held),
            (&page.dram_live_bytes, dram_live),
            (&page.dram_granule_bytes, usage.dram_held),
            (&page.extent_live_peak, usage.extent_live_peak),
            (&page.extent_held_peak, usage.extent_held_peak),
            (&page.dram_live_peak, usage.dram_live_peak + stats.outside),
            (&page.dram_granule_peak, usage.dram_held_peak),
            (&page.granules_extent, usage.extent_held / granule),
            (&page.granules_dram, usage.dram_held / granule),
            (&page.grants, stats.grants),
            (&page.returns, stats.returned / granule),
            (&page.recalls, stats.recalls),
            (&page.recall_bytes_asked, stats.recall_asked),
            (&page.recall_bytes_returned, stats.recall_returned),
            (&page.recall_bytes_refused, stats.recall_refused),
            (&page.evacuated_granules, stats.evacuated),
            (&page.promoted_granules, stats.promoted),
            (&page.unforked_granules, stats.unforked),
            (&page.spilled_granules, usage.spilled_held / granule),
            (&page.restored_granules, stats.restored),
            (&page.spill_lost_granules, stats.spill_lost),
            (&page.lost_granules, stats.lost / granule),
            (&page.pinned_granules, stats.pinned / granule),
            (&page.move_stall_max_ns, stats.stalls.max),
            (&page.exhausted_count, stats.exhausted),
            (&page.config_unknown_keys, u64::from(stats.unknown_settings)),
            (&page.arenas, u64::from(stats.arenas)),
            (&page.degraded_flags, flags),
            (&page.heap_live_peak_total, usage.live_peak + stats.outside),
            (&page.extent_share_at_peak, stats.extent_share_at_peak()),
            (&page.stall_ns, stats.stalls.total),
            (&page.live_over_time, stats.live_over_time),
            (&page.extents_over_time, stats.extents_over_time),
        ] {
            counter.store(value, Ordering::Relaxed);
        }
        for (bucket, waits) in page.stalls.iter().zip(stats.stalls.by_power) {
            bucket.store(waits, Ordering::Relaxed);
        }
    }
}

fn reason(refusal: Refusal) -> RefusalReason {
    match refusal {
        Refusal::CannotMove => RefusalReason::CannotMove,
        Refusal::Deadline => RefusalReason::Deadline,
        Refusal::Pinned => RefusalReason::Pinned,
        Refusal::NoDram => RefusalReason::DramLimit,
        Refusal::MappingChanged => RefusalReason::Remapped,
        Refusal::SpillFull => RefusalReason::SpillFull,
        Refusal::SpillFailed => RefusalReason::SpillFailed,
        Refusal::Mappings => RefusalReason::Mappings,
        _ => RefusalReason::Live,
    }
}

fn to_wire(ranges: &Ranges) -> [WireRange; RANGES_PER_EVENT] {
    let mut wire = [WireRange { offset: 0, len: 0 }; RANGES_PER_EVENT];
    for (wire, range) in wire.iter_mut().zip(ranges.as_slice()) {
        *wire = WireRange {
            offset: range.offset,
            len: range.len,
        };
    }
    wire
}

fn shared(wire: &WireRuns) -> SharedRuns {
    SharedRuns::new(wire.as_slice().iter().map(from_wire_run))
}

fn from_wire_run(run: &WireRun) -> SharedRun {
    SharedRun {
        addr: run.addr as usize,
        offset: run.offset,
        len: run.len as usize,
    }
}

fn from_wire(wire: &[WireRange]) -> Ranges {
    let mut ranges = Ranges::EMPTY;
    for range in wire {
        ranges.push(WindowRange {
            offset: range.offset,
            len: range.len,
        });
    }
    ranges
}

/// Gives the calling thread a descriptor table of its own that holds nothing
/// but two descriptors (close_range(2) with `CLOSE_RANGE_UNSHARE`, Linux 5.9).
/// `false`: that is refused, and the thread stays in the program's table.
fn own_table(a: RawFd, b: RawFd) -> bool {
    let (low, high) = (a.min(b) as libc::c_uint, a.max(b) as libc::c_uint);
    let apart = close_range(high + 1, libc::c_uint::MAX, CLOSE_RANGE_UNSHARE);
    if apart {
        close_range(low + 1, high.saturating_sub(1), 0);
        if low > 0 {
            close_range(0, low - 1, 0);
        }
    }
    apart
}

const CLOSE_RANGE_UNSHARE: libc::c_uint = 2;

/// close_range(2), in a table that the calling thread has for itself: the
/// first call unshares it, and threads it starts later share it. Whether it
/// was done.
fn close_range(first: libc::c_uint, last: libc::c_uint, flags: libc::c_uint) -> bool {
    // SAFETY: the descriptors are closed for this thread alone.
    first > last || unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } == 0
}
