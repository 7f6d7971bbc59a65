//! Staging: from Add Capacity records to groups, each of which is answered exactly once.
//!
//! Extents chained by the More flag of their records are one group, and a host gets one chance
//! to answer a group: accepting the first extent alone rejects the rest. So nothing is answered,
//! and no memory used, before the record without More has come. This module decides when a group
//! is complete; [`judge`] decides what to take of it. Neither does any I/O or looks at a clock.

#![forbid(unsafe_code)]

mod verdict;

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::extent::Extent;

pub use verdict::{Decision, Preparation, Prepare, RejectReason, TakeWhole, Verdict, judge};

/// Bounds on a group that does not end.
#[derive(Clone, Copy, Debug)]
pub struct StagingLimits {
    /// How long after its last record an open group is given up. Linux: 20 s.
    pub timeout: Duration,
    /// How many extents one group may have.
    pub max_extents: usize,
}

impl Default for StagingLimits {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(20),
            max_extents: 4096,
        }
    }
}

/// What staging is told, in the order in which the device's log has it.
#[derive(Clone, Copy, Debug)]
pub enum StagingEvent {
    /// An Add Capacity record.
    Add {
        /// What is offered, as the device wrote it.
        extent: Extent,
        /// Whether the group goes on.
        more: bool,
    },
    /// The log ran over here: records are missing between those before and those after.
    RecordsLost,
    /// Time has passed.
    Tick,
}

/// What staging wants done about an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StagingAction {
    /// Nothing.
    Wait,
    /// Answer this group, once, after all that were closed before it.
    Answer(OfferedGroup),
    /// The record belongs to a group that is answered already. `last` says that it ended it.
    Discarded {
        /// Whether the record closed the chain.
        last: bool,
    },
}

/// Why a group was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Closed {
    /// Its last record came.
    Complete,
    /// The log ran over within it; what came before is whole.
    Truncated,
    /// Its last record did not come in time: answer with nothing.
    TimedOut,
    /// It has more extents than may be staged: answer with nothing.
    TooLarge,
    /// There is no memory to stage it: answer with nothing.
    OutOfMemory,
}

/// A closed group, waiting for its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedGroup {
    /// What was offered, in the order of the records.
    pub extents: Vec<Extent>,
    /// Why it ends there.
    pub closed: Closed,
}

impl OfferedGroup {
    /// The reason to reject everything in it unseen, if there is one.
    pub fn rejected_whole(&self) -> Option<RejectReason> {
        match self.closed {
            Closed::Complete | Closed::Truncated => None,
            Closed::TimedOut => Some(RejectReason::GroupTimedOut),
            Closed::TooLarge => Some(RejectReason::GroupTooLarge),
            Closed::OutOfMemory => Some(RejectReason::OutOfMemory),
        }
    }
}

/// The group that records are being collected for, if any.
#[derive(Debug)]
pub struct Staging {
    limits: StagingLimits,
    open: Vec<Extent>,
    /// When the open group's last record came; `None` if no group is open.
    last_record: Option<Instant>,
    /// The open chain has been answered already; its remaining records are dropped.
    discarding: bool,
}

impl Staging {
    /// No group is open.
    pub fn new(limits: StagingLimits) -> Self {
        Self {
            limits,
            open: Vec::new(),
            last_record: None,
            discarding: false,
        }
    }

    /// As it was when [`open_extents`](Self::open_extents) and
    /// [`is_discarding`](Self::is_discarding) said this; the time-out starts anew.
    pub fn resume(
        limits: StagingLimits,
        open: Vec<Extent>,
        discarding: bool,
        now: Instant,
    ) -> Self {
        Self {
            limits,
            last_record: (!open.is_empty()).then_some(now),
            open,
            discarding,
        }
    }

    /// The extents of the open group so far, none of which may be used.
    pub fn open_extents(&self) -> &[Extent] {
        &self.open
    }

    /// Whether the records that come are dropped until their chain ends.
    pub fn is_discarding(&self) -> bool {
        self.discarding
    }

    /// Takes one event at time `now`.
    pub fn step(&mut self, now: Instant, event: StagingEvent) -> StagingAction {
        match event {
            StagingEvent::Add { more, .. } if self.discarding => {
                self.discarding = more;
                StagingAction::Discarded { last: !more }
            }
            StagingEvent::Add { extent, more } => self.stage(now, extent, more),
            StagingEvent::RecordsLost => {
                // The end of a chain that is being dropped may be among them.
                self.discarding = false;
                match self.last_record {
                    Some(_) => self.close(Closed::Truncated),
                    None => StagingAction::Wait,
                }
            }
            StagingEvent::Tick => match self.last_record {
                Some(last) if now.saturating_duration_since(last) >= self.limits.timeout => {
                    self.discarding = true;
                    self.close(Closed::TimedOut)
                }
                _ => StagingAction::Wait,
            },
        }
    }

    fn stage(&mut self, now: Instant, extent: Extent, more: bool) -> StagingAction {
        let refused = if self.open.len() >= self.limits.max_extents {
            Some(Closed::TooLarge)
        } else if self.open.try_reserve(1).is_err() {
            Some(Closed::OutOfMemory)
        } else {
            None
        };
        if let Some(closed) = refused {
            self.discarding = more;
            return self.close(closed);
        }
        self.open.push(extent);
        self.last_record = Some(now);
        if more {
            StagingAction::Wait
        } else {
            self.close(Closed::Complete)
        }
    }

    fn close(&mut self, closed: Closed) -> StagingAction {
        self.last_record = None;
        StagingAction::Answer(OfferedGroup {
            extents: std::mem::take(&mut self.open),
            closed,
        })
    }
}
