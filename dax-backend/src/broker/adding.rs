//! What the device says: capacity that comes, and capacity it wants or takes.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::admin::{Added, AdminReply, RejectedExtent};
use super::connection::ConnectionId;
use super::handover::describe;
use super::recall::{RecallRequest, Target};
use super::receipt::{DpaSpan, Origin};
use super::server::Broker;
use crate::address::DpaRange;
use crate::capacity::DeviceEvent;
use crate::extent::{Extent, ExtentTag};

/// How long an offer, or a forced release, may take to arrive as an event of the device.
pub(super) const OFFER_PATIENCE: Duration = Duration::from_secs(5);

/// An offer made for an operator who waits for what comes of it.
#[derive(Debug)]
pub(super) struct PendingAdd {
    requester: ConnectionId,
    requested: Instant,
    offered: Vec<DpaRange>,
    added: Added,
}

impl PendingAdd {
    fn concerns(&self, extent: &Extent) -> bool {
        self.offered
            .iter()
            .any(|offered| offered.intersects(&extent.range))
    }

    fn is_settled(&self) -> bool {
        let bytes = |spans: &[DpaSpan]| spans.iter().map(|span| span.len).sum::<u64>();
        let rejected: u64 = self.added.rejected.iter().map(|r| r.span.len).sum();
        bytes(&self.added.accepted) + rejected >= bytes(&self.added.offered)
    }
}

impl Broker {
    /// Asks the orchestrator for capacity on behalf of an operator.
    pub(super) fn add(
        &mut self,
        requester: ConnectionId,
        sizes: &[u64],
        tag: Option<Uuid>,
        now: Instant,
    ) {
        let tag = tag.map_or(ExtentTag::NULL, ExtentTag::from);
        let refused = match &mut self.orchestrator {
            None => "this broker has no orchestrator: capacity of its device is added by the \
                     fabric manager (FM-API, Redfish or QMP), not by dcm add"
                .to_owned(),
            Some(_) if sizes.is_empty() => "no size given".to_owned(),
            Some(orchestrator) => match orchestrator.add(sizes, tag) {
                Ok(extents) => {
                    let offered: Vec<DpaRange> = extents.iter().map(|e| e.range).collect();
                    self.adds.push(PendingAdd {
                        requester,
                        requested: now,
                        added: Added {
                            offered: offered.iter().copied().map(DpaSpan::from).collect(),
                            ..Added::default()
                        },
                        offered,
                    });
                    self.stay_busy(now);
                    return;
                }
                Err(error) => describe(&error),
            },
        };
        self.reply(requester, &AdminReply::Error { message: refused }, now);
    }

    /// Takes what the device has to say; whether it said anything.
    pub(super) fn take_device_events(&mut self, now: Instant) -> Result<bool, ()> {
        let events = match self.device.poll() {
            Ok(events) => events,
            Err(error) => {
                self.device_error = Some(describe(&error));
                return Err(());
            }
        };
        if events.is_empty() {
            return Ok(false);
        }
        let (mut wanted, mut taken) = (Vec::new(), Vec::new());
        for event in events {
            match event {
                DeviceEvent::Accepted { extents } => {
                    for extent in extents {
                        if let Some(add) = self.adds.iter_mut().find(|add| add.concerns(&extent)) {
                            add.added.accepted.push(extent.range.into());
                        }
                    }
                }
                DeviceEvent::Rejected { extents } => {
                    for (extent, reason) in extents {
                        if let Some(add) = self.adds.iter_mut().find(|add| add.concerns(&extent)) {
                            add.added.rejected.push(RejectedExtent {
                                span: extent.range.into(),
                                reason: reason.to_string(),
                            });
                        }
                    }
                }
                DeviceEvent::ReleaseRequested { range, .. } => wanted.push(range),
                DeviceEvent::ForcedRelease { range, .. } => taken.push(range),
                DeviceEvent::RegionsUpdated { .. } => self.table.block = self.device.block_size(),
                DeviceEvent::Overflow { lost } => {
                    self.device_error = Some(format!(
                        "the device's event log ran over: {lost} records lost"
                    ));
                }
            }
        }
        let synced = self.sync_capacity();
        if !taken.is_empty() || !synced.lost.is_empty() {
            self.taken_by_force(&taken, &synced.lost, now);
        }
        if !wanted.is_empty() {
            DpaRange::coalesce(&mut wanted);
            let request = RecallRequest {
                origin: Origin::Device,
                target: Target::Ranges(wanted),
                patience: self.config.recall_deadline,
                requester: None,
                requested: now,
            };
            self.recall(request, now);
        }
        self.wipe();
        self.answer_adds(Instant::now(), PendingAdd::is_settled);
        Ok(true)
    }

    /// Answers operators whose offer never arrived, with what is known.
    pub(super) fn expire_adds(&mut self, now: Instant) {
        self.answer_adds(now, |add| {
            now.saturating_duration_since(add.requested) >= OFFER_PATIENCE
        });
    }

    fn answer_adds(&mut self, now: Instant, done: impl Fn(&PendingAdd) -> bool) {
        for mut add in self
            .adds
            .extract_if(.., |add| done(add))
            .collect::<Vec<_>>()
        {
            let spent = now.saturating_duration_since(add.requested);
            add.added.duration_us = spent.as_micros() as u64;
            self.reply(add.requester, &AdminReply::Added(add.added), now);
        }
    }
}
