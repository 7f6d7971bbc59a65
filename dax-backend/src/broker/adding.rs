//! What the device says: capacity that comes, and capacity it wants or takes.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::admin::{Added, AdminReply, RejectedExtent, SharedOffer};
use super::connection::ConnectionId;
use super::fabric::FabricThread;
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
    ticket: u64,
    /// `None`: the capacity policy.
    requester: Option<ConnectionId>,
    requested: Instant,
    /// `None`: the orchestrator has not answered.
    offered: Option<Vec<DpaRange>>,
    added: Added,
}

/// An offered extent that the driver has accepted or, for a reason, rejected.
#[derive(Debug)]
pub(super) struct Outcome {
    range: DpaRange,
    rejected: Option<String>,
}

impl PendingAdd {
    fn concerns(&self, range: &DpaRange) -> bool {
        let offered = self.offered.iter().flatten();
        offered.into_iter().any(|offered| offered.intersects(range))
    }

    fn is_settled(&self) -> bool {
        let bytes = |spans: &[DpaSpan]| spans.iter().map(|span| span.len).sum::<u64>();
        let rejected: u64 = self.added.rejected.iter().map(|r| r.span.len).sum();
        self.offered.is_some()
            && bytes(&self.added.accepted) + rejected >= bytes(&self.added.offered)
    }
}

impl Broker {
    /// Asks the orchestrator for capacity on behalf of an operator.
    pub(super) fn add(
        &mut self,
        requester: ConnectionId,
        sizes: Vec<u64>,
        tag: Option<Uuid>,
        shared: Option<SharedOffer>,
        now: Instant,
    ) {
        let tag = tag.map_or(ExtentTag::NULL, ExtentTag::from);
        let refused = match &mut self.fabric {
            None => {
                "this broker has no orchestrator: capacity of its device is added by the \
                     fabric manager (FM-API, Redfish or QMP), not by dcm add"
            }
            Some(_) if sizes.is_empty() => "no size given",
            Some(_) if shared.is_some() && tag.is_null() => {
                "shared capacity has a tag, by which hosts know it: say --tag UUID"
            }
            Some(fabric) => {
                let held = &self.device.snapshot.accepted;
                self.adds.push(PendingAdd {
                    ticket: fabric.add(sizes, tag, shared, held),
                    requester: Some(requester),
                    requested: now,
                    offered: None,
                    added: Added::default(),
                });
                return;
            }
        };
        let message = refused.to_owned();
        self.reply(requester, &AdminReply::Error { message }, now);
    }

    /// Asks the orchestrator for an extent, for the capacity policy.
    pub(super) fn ask_for_more(&mut self, bytes: u64, now: Instant) {
        if let Some(fabric) = &mut self.fabric {
            self.adds.push(PendingAdd {
                ticket: fabric.add(
                    vec![bytes],
                    ExtentTag::NULL,
                    None,
                    &self.device.snapshot.accepted,
                ),
                requester: None,
                requested: now,
                offered: None,
                added: Added::default(),
            });
        }
    }

    /// Takes what the orchestrator has answered.
    pub(super) fn take_answers(&mut self, now: Instant) {
        let answers = self.fabric.as_ref().map(FabricThread::answers);
        for answer in answers.into_iter().flatten() {
            self.device.hurry();
            match answer.offered {
                Ok(extents) => self.offered(answer.ticket, &extents),
                Err(message) => {
                    let adds = self.adds.extract_if(.., |add| add.ticket == answer.ticket);
                    let mut refused: Vec<_> = adds.map(|add| add.requester).collect();
                    let forces = self.forces.extract_if(.., |f| f.ticket == answer.ticket);
                    refused.extend(forces.map(|force| Some(force.requester)));
                    for requester in refused {
                        let message = message.clone();
                        match requester {
                            Some(id) => self.reply(id, &AdminReply::Error { message }, now),
                            None => {
                                tracing::warn!(message, "the orchestrator adds nothing");
                                self.policy.refused(message);
                            }
                        }
                    }
                }
            }
        }
        self.answer_adds(now, PendingAdd::is_settled);
    }

    fn offered(&mut self, ticket: u64, extents: &[Extent]) {
        let ranges: Vec<DpaRange> = extents.iter().map(|extent| extent.range).collect();
        if let Some(add) = self.adds.iter_mut().find(|add| add.ticket == ticket) {
            add.added.offered = ranges.iter().copied().map(DpaSpan::from).collect();
            add.offered = Some(ranges);
        }
        // The device may have been quicker than the orchestrator's answer.
        for outcome in std::mem::take(&mut self.outcomes) {
            self.book(outcome);
        }
    }

    fn book(&mut self, outcome: Outcome) {
        let range = outcome.range;
        if let Some(add) = self.adds.iter_mut().find(|add| add.concerns(&range)) {
            match outcome.rejected {
                None => add.added.accepted.push(range.into()),
                Some(reason) => add.added.rejected.push(RejectedExtent {
                    span: range.into(),
                    reason,
                }),
            }
        } else if self.adds.iter().any(|add| add.offered.is_none()) {
            self.outcomes.push(outcome);
        }
    }

    /// Takes what the device's thread has to say.
    pub(super) fn take_reports(&mut self, now: Instant) {
        for report in self.device.reports() {
            self.device.snapshot = report.snapshot;
            match report.polled {
                Ok(events) => self.take_device_events(events, now),
                Err(error) => {
                    tracing::error!(error, "the device fails");
                    self.device_error = Some(error);
                }
            }
            if let Some(result) = report.released {
                self.handed_over(result, now);
            }
        }
        self.answer_adds(now, PendingAdd::is_settled);
    }

    fn take_device_events(&mut self, events: Vec<DeviceEvent>, now: Instant) {
        let (mut wanted, mut taken) = (Vec::new(), Vec::new());
        for event in events {
            match event {
                DeviceEvent::Accepted { extents } => {
                    for extent in extents {
                        tracing::info!(dpa = %extent.range, tag = %extent.tag, "extent accepted");
                        self.book(Outcome {
                            range: extent.range,
                            rejected: None,
                        });
                    }
                }
                DeviceEvent::Rejected { extents } => {
                    for (extent, reason) in extents {
                        tracing::warn!(dpa = %extent.range, %reason, "extent rejected");
                        self.book(Outcome {
                            range: extent.range,
                            rejected: Some(reason.to_string()),
                        });
                    }
                }
                DeviceEvent::ReleaseRequested { range, .. } => {
                    tracing::info!(dpa = %range, "the device asks for capacity back");
                    wanted.push(range);
                }
                DeviceEvent::ForcedRelease { range, .. } => {
                    tracing::error!(dpa = %range, "the device has taken capacity by force");
                    taken.push(range);
                }
                DeviceEvent::RegionsUpdated { region } => {
                    tracing::info!(region, "a DC region has changed");
                    self.table.block = self.device.snapshot.block_size;
                }
                DeviceEvent::Overflow { lost } => {
                    tracing::error!(lost, "the device's event log ran over");
                    self.device_error = Some(format!(
                        "the device's event log ran over: {lost} records lost"
                    ));
                }
            }
        }
        // What was taken may be offered again already: then the list looks as before.
        let gone = self.table.take(&taken);
        let synced = self.sync_capacity().after(gone);
        if !taken.is_empty() {
            self.taken_from_leaving(&taken);
        }
        if !taken.is_empty() || synced.has_lost() {
            self.taken_by_force(&taken, &synced, now);
        }
        if !wanted.is_empty() {
            DpaRange::coalesce(&mut wanted);
            let request = RecallRequest {
                origin: Origin::Device,
                target: Target::Ranges(wanted),
                patience: self.config.recall_deadline,
                past_deadline: false,
                requester: None,
                progress: false,
                requested: now,
            };
            self.recall(request, now);
        }
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
            let spent = now
                .max(Instant::now())
                .saturating_duration_since(add.requested);
            add.added.duration_us = spent.as_micros() as u64;
            let Some(requester) = add.requester else {
                let accepted = add.added.accepted.iter().map(|span| span.len);
                self.policy.added(accepted.sum());
                continue;
            };
            let reply = match add.offered {
                Some(_) => AdminReply::Added(add.added),
                None => AdminReply::Error {
                    message: "the orchestrator has not answered yet; what it offers is accepted \
                              when it comes"
                        .into(),
                },
            };
            self.reply(requester, &reply, now);
        }
        if self.adds.iter().all(|add| add.offered.is_some()) {
            self.outcomes.clear();
        }
    }
}
