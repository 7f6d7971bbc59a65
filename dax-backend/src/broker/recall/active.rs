//! The recall under way: whom it has asked, what they said, what is back.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::Target;
use crate::broker::connection::ConnectionId;
use crate::broker::lease::ClientId;
use crate::broker::outcome::RecallOutcome;
use crate::broker::protocol::{Ranges, RefusalReason, WindowRange};
use crate::broker::receipt::Receipt;

/// One message to one client that is not answered yet.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) client: ClientId,
    pub(super) bytes: u64,
    /// Of these: refused.
    pub(super) refused: u64,
    /// And for how many reasons.
    pub(super) reasons: usize,
}

/// What a client did not return.
#[derive(Debug)]
pub(in crate::broker) struct Declined {
    pub(in crate::broker) client: ClientId,
    pub(in crate::broker) pid: u32,
    pub(in crate::broker) bytes: u64,
    pub(in crate::broker) reason: RefusalReason,
    pub(in crate::broker) ranges: Ranges,
}

/// The recall under way.
#[derive(Debug)]
pub(in crate::broker) struct ActiveRecall {
    pub(in crate::broker) target: Target,
    pub(in crate::broker) receipt: Receipt,
    pub(in crate::broker) declined: Vec<Declined>,
    /// The device's words when it did not take something.
    pub(in crate::broker) device_error: Option<String>,
    pub(super) deadline: Instant,
    pub(super) past_deadline: bool,
    /// It has outlived its deadline.
    pub(super) overdue: bool,
    pub(super) requester: Option<ConnectionId>,
    /// When the requester may hear next how far it is, if it wants to.
    pub(super) progress: Option<Instant>,
    pub(super) requested: Instant,
    pub(super) waiting: BTreeMap<u64, Ask>,
    /// Clients with no more to give.
    pub(super) spent: BTreeSet<ClientId>,
    /// Free bytes marked for this recall and not released yet.
    pub(in crate::broker) claimed: u64,
    /// What clients say they returned and the device has not taken yet.
    pub(in crate::broker) said: RecallOutcome,
    /// Bytes that the device has taken and no client has said a word about yet:
    /// what clients return goes on at once, their word comes at the end.
    pub(in crate::broker) unsaid: u64,
    /// The deadline has passed; only the device is waited for.
    pub(super) closing: bool,
    /// Marked by this recall, leased or free.
    pub(super) marked: Vec<WindowRange>,
    pub(super) rounds: u32,
    pub(super) asked: bool,
}

impl ActiveRecall {
    pub(in crate::broker) fn missing(&self) -> u64 {
        let have = self.receipt.returned + self.claimed;
        self.receipt.asked.saturating_sub(have)
    }

    /// Whether any client was asked.
    pub(in crate::broker) fn has_asked(&self) -> bool {
        self.asked
    }

    /// Adds what a client says.
    pub(super) fn hear(&mut self, outcome: &RecallOutcome) {
        self.said.add(outcome);
        let receipt = &mut self.receipt;
        receipt.copied = receipt.copied.saturating_add(outcome.copied);
        receipt.moving_us = receipt.moving_us.max(outcome.moving_us);
        receipt.stalls.add(&outcome.stalls);
        self.settle();
    }

    /// Books what is back under the steps that clients name.
    pub(in crate::broker) fn settle(&mut self) {
        let (receipt, said) = (&mut self.receipt, &mut self.said);
        for (step, said) in [
            (&mut receipt.returned_idle, &mut said.idle),
            (&mut receipt.returned_purged, &mut said.purged),
            (&mut receipt.returned_dropped, &mut said.dropped),
            (&mut receipt.returned_to_extents, &mut said.to_extents),
            (&mut receipt.returned_to_dram, &mut said.to_dram),
            (&mut receipt.returned_spilled, &mut said.spilled),
        ] {
            let bytes = self.unsaid.min(*said);
            self.unsaid -= bytes;
            *said -= bytes;
            *step += bytes;
        }
    }

    /// What is back without a word is taken for idle.
    pub(super) fn receipt_now(&self, now: Instant) -> Receipt {
        let mut receipt = self.receipt.clone();
        receipt.returned_idle += self.unsaid;
        receipt.duration_us = self.duration_us(now);
        receipt
    }

    fn duration_us(&self, now: Instant) -> u64 {
        let spent = now.max(Instant::now()).duration_since(self.requested);
        spent.as_micros() as u64
    }

    pub(super) fn decline(&mut self, ask: &Ask, pid: u32, reason: RefusalReason) {
        self.declined.push(Declined {
            client: ask.client,
            pid,
            bytes: ask.bytes - ask.refused,
            reason,
            ranges: Ranges::default(),
        });
    }
}
