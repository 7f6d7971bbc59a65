//! Forced release: the device has taken memory, whoever used it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Instant;

use super::adding::OFFER_PATIENCE;
use super::admin::AdminReply;
use super::connection::ConnectionId;
use super::lease::{ClientId, Synced};
use super::protocol::{RefusalReason, WindowRange};
use super::recall::Target;
use super::receipt::{DpaSpan, Origin};
use super::server::Broker;
use crate::address::DpaRange;

/// Memory that the orchestrator takes for an operator who waits for the receipt.
#[derive(Debug)]
pub(super) struct PendingForce {
    pub(super) ticket: u64,
    pub(super) requester: ConnectionId,
    requested: Instant,
    range: DpaRange,
}

impl Broker {
    /// Has the orchestrator take what an operator names. Everything else is
    /// as if the fabric manager had done so by itself.
    pub(super) fn force(&mut self, requester: ConnectionId, target: &Target, now: Instant) {
        let refused = match (&mut self.fabric, target) {
            (_, Target::Bytes(_)) => {
                "what is taken by force must be named: a range (0x20000000+256M), not a size"
            }
            (None, _) => {
                "this broker has no orchestrator: only the fabric manager of its device \
                          can take capacity by force"
            }
            (Some(fabric), Target::Ranges(ranges)) => {
                let ticket = fabric.force(ranges.clone());
                self.forces.extend(ranges.iter().map(|range| PendingForce {
                    ticket,
                    requester,
                    requested: now,
                    range: *range,
                }));
                return;
            }
        };
        self.reply(
            requester,
            &AdminReply::Error {
                message: refused.into(),
            },
            now,
        );
    }

    /// Tells operators of forced releases that the device has not announced.
    pub(super) fn expire_forces(&mut self, now: Instant) {
        let late = |force: &mut PendingForce| {
            now.saturating_duration_since(force.requested) >= OFFER_PATIENCE
        };
        for force in self.forces.extract_if(.., late).collect::<Vec<_>>() {
            let message = format!("the device has not said that {} is gone", force.range);
            self.reply(force.requester, &AdminReply::Error { message }, now);
        }
    }

    /// The device has taken `ranges`; some were leased or mapped. Nobody can be
    /// asked, but everybody concerned is told.
    pub(super) fn taken_by_force(&mut self, ranges: &[DpaRange], synced: &Synced, now: Instant) {
        let lost = &synced.lost;
        let found: Vec<DpaRange>;
        let ranges = if ranges.is_empty() {
            // Nobody said so: the device's list shows it.
            let leased = lost.iter().map(|(_, range)| range);
            let shared = synced.shared_lost.iter().map(|(_, range)| range);
            let gone = leased.chain(shared);
            found = gone.map(|range| self.table.dpa(*range)).collect();
            &found
        } else {
            ranges
        };
        self.recalls.recalls += 1;
        self.counters.recalls += 1;
        let mut receipt = self.new_receipt(Origin::Forced, &Target::Ranges(ranges.to_vec()));
        receipt.ranges = ranges.iter().copied().map(DpaSpan::from).collect();
        let mut told: BTreeMap<ClientId, Vec<WindowRange>> = BTreeMap::new();
        for (client, range) in lost {
            told.entry(*client).or_default().push(*range);
            let pid = self.clients.get(client).map(|c| c.peer.pid);
            receipt
                .refused
                .push(self.refusal_of(*range, RefusalReason::Lost, pid));
        }
        for (range, pid) in self.shared_taken(&synced.shared_lost) {
            receipt
                .refused
                .push(self.refusal_of(range, RefusalReason::Lost, pid));
        }
        receipt.returned = receipt.asked.saturating_sub(receipt.refused_bytes());
        receipt.returned_free = receipt.returned;
        for (id, ranges) in told {
            if id.is_family() {
                self.lose_originals(id, &ranges);
                continue;
            }
            let Some(client) = self.clients.get_mut(&id) else {
                continue;
            };
            client.recalls += 1;
            let bytes: u64 = ranges.iter().map(|range| range.len).sum();
            client.leased = client.leased.saturating_sub(bytes);
            self.tell_lost(id, &ranges);
        }
        let told = |force: &PendingForce| ranges.iter().any(|range| range.intersects(&force.range));
        let waiting = self.forces.iter().position(told);
        let requester = waiting.map(|index| self.forces.swap_remove(index).requester);
        self.file_receipt(receipt, requester, now);
    }
}
