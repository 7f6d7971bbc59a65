//! The device, on a thread of its own: a mailbox command may take seconds
//! (CXL r3.1 8.2.8.4, command time-out), and clients do not wait with it.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::handover::describe;
use super::helper::{Helper, Outbox};
use super::protocol::{GRANULE, WindowRange};
use super::scrub::Window;
use crate::address::{Dpa, DpaRange};
use crate::capacity::{CapacityDevice, DeviceCounters, DeviceEvent};
use crate::extent::Extent;

/// How long the device is polled quickly after something happened.
const BUSY_FOR: Duration = Duration::from_secs(2);
/// Intervals of polling the device: after something happened, while a client
/// waits for capacity, when nothing goes on, and after an error.
const POLL_BUSY: Duration = Duration::from_millis(1);
const POLL_STARVING: Duration = Duration::from_millis(5);
const POLL_IDLE: Duration = Duration::from_millis(20);
const POLL_FAILED: Duration = Duration::from_millis(250);
/// Longest interval after errors.
const POLL_HOPELESS: Duration = Duration::from_secs(16);

/// What a device was like when its thread last said so.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// Extents held, in order of DPA.
    pub(super) accepted: Vec<Extent>,
    /// Where those start that come zeroed.
    sanitized: Vec<Dpa>,
    /// Where those start that may be shared with other hosts.
    sharable: Vec<Dpa>,
    pub(super) block_size: u64,
    pub(super) counters: DeviceCounters,
}

impl Snapshot {
    fn of(device: &dyn CapacityDevice) -> Self {
        let accepted = device.accepted().to_vec();
        let ranges = accepted.iter().map(|extent| extent.range);
        let sanitized = ranges.clone().filter(|range| device.sanitizes(range));
        let sharable = ranges.filter(|range| device.shares(range));
        Self {
            sanitized: sanitized.map(|range| range.start).collect(),
            sharable: sharable.map(|range| range.start).collect(),
            block_size: device.block_size(),
            counters: device.counters(),
            accepted,
        }
    }

    /// Whether the extent at `range` came zeroed.
    pub(super) fn sanitizes(&self, range: &DpaRange) -> bool {
        self.sanitized.binary_search(&range.start).is_ok()
    }

    /// Whether the extent at `range` may be shared with other hosts.
    pub(super) fn shares(&self, range: &DpaRange) -> bool {
        self.sharable.binary_search(&range.start).is_ok()
    }
}

/// What the device's thread has to say.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) snapshot: Snapshot,
    /// What a poll brought, or why it failed.
    pub(super) polled: Result<Vec<DeviceEvent>, String>,
    /// What came of the release that was ordered, if one was.
    pub(super) released: Option<Result<(), String>>,
}

#[derive(Debug)]
enum Order {
    /// Wipe `slots`, then give `ranges` back.
    Release {
        slots: Vec<WindowRange>,
        ranges: Vec<DpaRange>,
    },
    /// Something is going on: look now, and often for a while.
    Hurry,
}

/// The broker's end of the device.
#[derive(Debug)]
pub(super) struct DeviceThread {
    thread: Helper<Order, Report>,
    starving: Arc<AtomicBool>,
    span: DpaRange,
    /// What the thread last said.
    pub(super) snapshot: Snapshot,
}

impl DeviceThread {
    /// Puts `device` on a thread, which ends when this is dropped.
    pub(super) fn start(device: Box<dyn CapacityDevice>, window: Arc<Window>) -> io::Result<Self> {
        let snapshot = Snapshot::of(&*device);
        let span = device.dc_span();
        let starving = Arc::new(AtomicBool::new(false));
        let driver = Driver {
            device,
            window,
            starving: starving.clone(),
            reported: snapshot.counters,
            unsettled: None,
            failed: 0,
            busy_until: Instant::now() + BUSY_FOR,
        };
        let thread = Helper::start("dcm-device", move |orders, reports| {
            driver.run(&orders, &reports);
        })?;
        Ok(Self {
            thread,
            starving,
            span,
            snapshot,
        })
    }

    /// From the lowest DC region's base to the highest one's end.
    pub(super) fn span(&self) -> DpaRange {
        self.span
    }

    /// Something is going on: it is polled at once, and often for a while; but
    /// a device that fails is left alone.
    pub(super) fn hurry(&self) {
        self.thread.order(Order::Hurry);
    }

    /// Whether somebody waits for capacity.
    pub(super) fn set_starving(&self, starving: bool) {
        self.starving.store(starving, Ordering::Relaxed);
    }

    /// Has `slots` wiped and `ranges` released; a [`Report`] says what came of
    /// it. One at a time.
    pub(super) fn release(&self, slots: Vec<WindowRange>, ranges: Vec<DpaRange>) {
        self.thread.order(Order::Release { slots, ranges });
    }

    /// What the thread has said since the last call.
    pub(super) fn reports(&self) -> Vec<Report> {
        self.thread.results()
    }
}

impl AsFd for DeviceThread {
    /// Readable when there are reports.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.thread.as_fd()
    }
}

/// What runs on the thread.
struct Driver {
    device: Box<dyn CapacityDevice>,
    window: Arc<Window>,
    starving: Arc<AtomicBool>,
    reported: DeviceCounters,
    /// Why a release failed, until it is known what became of it: a command
    /// that timed out may have been executed, and a poll finds out.
    unsettled: Option<String>,
    /// Polls that failed in a row.
    failed: u32,
    busy_until: Instant,
}

impl Driver {
    fn run(mut self, orders: &Receiver<Order>, reports: &Outbox<Report>) {
        let mut next_poll = Instant::now();
        loop {
            let patience = next_poll.saturating_duration_since(Instant::now());
            let report = match orders.recv_timeout(patience) {
                Ok(Order::Release { slots, ranges }) => {
                    let report = self.release(&slots, &ranges);
                    if report.is_none() {
                        next_poll = Instant::now();
                    }
                    report
                }
                Ok(Order::Hurry) => {
                    self.busy_until = Instant::now() + BUSY_FOR;
                    if self.failed == 0 {
                        next_poll = Instant::now();
                    }
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => {
                    let report = self.poll();
                    // From now: the device may have taken its time.
                    next_poll = Instant::now() + self.interval();
                    report
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if report.is_some_and(|report| !reports.send(report)) {
                return;
            }
        }
    }

    /// One poll; a report if there is anything to say.
    fn poll(&mut self) -> Option<Report> {
        let polled = self.device.poll();
        match &polled {
            Ok(events) if events.is_empty() => self.failed = 0,
            Ok(_) => {
                self.failed = 0;
                self.busy_until = Instant::now() + BUSY_FOR;
            }
            Err(_) => self.failed += 1,
        }
        let counters = self.device.counters();
        let silent = matches!(&polled, Ok(events) if events.is_empty());
        if silent && counters == self.reported && self.unsettled.is_none() {
            return None;
        }
        self.reported = counters;
        let settled = self.unsettled.take_if(|_| polled.is_ok());
        Some(Report {
            snapshot: Snapshot::of(&*self.device),
            polled: polled.map_err(|error| describe(&error)),
            released: settled.map(Err),
        })
    }

    fn interval(&self) -> Duration {
        match self.failed {
            0 if Instant::now() < self.busy_until => POLL_BUSY,
            0 if self.starving.load(Ordering::Relaxed) => POLL_STARVING,
            0 => POLL_IDLE,
            failed => (POLL_FAILED * (1 << (failed - 1).min(10))).min(POLL_HOPELESS),
        }
    }

    /// What of `ranges` the device has not taken by force since it was ordered to go back.
    fn held(&self, ranges: &[DpaRange]) -> Vec<DpaRange> {
        let held = |range| {
            let accepted = self.device.accepted().iter();
            accepted.filter_map(move |extent| extent.range.intersection(range))
        };
        ranges.iter().flat_map(held).collect()
    }

    /// The granules of `slots` that are held whole.
    fn held_slots(&self, slots: WindowRange) -> Vec<WindowRange> {
        let base = self.device.dc_span().start.0;
        let range = DpaRange {
            start: Dpa(base + slots.offset),
            len: slots.len,
        };
        let whole = |part: &DpaRange| {
            let offset = (part.start.0 - base).next_multiple_of(GRANULE);
            let end = (part.end().0 - base) / GRANULE * GRANULE;
            let len = end.saturating_sub(offset);
            (len > 0).then_some(WindowRange { offset, len })
        };
        self.held(&[range]).iter().filter_map(whole).collect()
    }

    /// Whoever gets the memory next need not be careful: it is wiped first.
    fn release(&mut self, slots: &[WindowRange], ranges: &[DpaRange]) -> Option<Report> {
        for range in slots.iter().flat_map(|range| self.held_slots(*range)) {
            self.window.discard(range);
        }
        if let Err(error) = self.device.release(&self.held(ranges)) {
            self.unsettled = Some(describe(&error));
            return None;
        }
        Some(Report {
            snapshot: Snapshot::of(&*self.device),
            polled: Ok(Vec::new()),
            released: Some(Ok(())),
        })
    }
}
