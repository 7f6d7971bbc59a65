//! Forced release: the device has taken memory, whoever used it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Instant;

use super::lease::ClientId;
use super::protocol::{Kind, MAX_RANGES, Message, RECALL_LOST, RefusalReason, WindowRange};
use super::recall::Target;
use super::receipt::{DpaSpan, Origin};
use super::server::Broker;
use crate::address::DpaRange;

impl Broker {
    /// The device has taken `ranges`; `lost` were leased. Nobody can be asked,
    /// but everybody concerned is told.
    pub(super) fn taken_by_force(
        &mut self,
        ranges: &[DpaRange],
        lost: &[(ClientId, WindowRange)],
        now: Instant,
    ) {
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
        receipt.returned = receipt.asked.saturating_sub(receipt.refused_bytes());
        receipt.returned_free = receipt.returned;
        for (id, ranges) in told {
            let Some(client) = self.clients.get_mut(&id) else {
                continue;
            };
            client.recalls += 1;
            let bytes: u64 = ranges.iter().map(|range| range.len).sum();
            client.leased = client.leased.saturating_sub(bytes);
            let connection = client.connection;
            for chunk in ranges.chunks(MAX_RANGES) {
                self.recalls.messages += 1;
                let message = Message::new(Kind::Recall)
                    .with_id(self.recalls.messages)
                    .with_arg(0, chunk.iter().map(|range| range.len).sum())
                    .with_flags(RECALL_LOST)
                    .with_ranges(chunk);
                self.post(connection, message);
            }
        }
        self.file_receipt(receipt, None, now);
    }
}
