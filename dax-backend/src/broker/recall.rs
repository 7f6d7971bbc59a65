//! Asking for memory back: free leases, then the clients, then the receipt.
//!
//! One recall at a time; the others queue. A recall marks what must go
//! (`outgoing.rs`), gives the device what is free, asks clients for the rest,
//! and gives the device what they return. Clients that do not answer by the
//! deadline are named in the receipt; if they were told to go on past it, the
//! recall goes on as well, until they have answered or another is asked for.
#![forbid(unsafe_code)]

mod active;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::admin::AdminReply;
use super::connection::ConnectionId;
use super::handover::Untaken;
use super::lease::ClientId;
use super::outcome::{RecallOutcome, StallTimes};
use super::protocol::{
    GRANULE, Kind, MAX_RANGES, Message, RECALL_PAST_DEADLINE, RefusalReason, WindowRange,
};
use super::receipt::{Origin, Receipt};
use super::server::Broker;
use super::status::{RecallAsk, RecallStatus};
use crate::address::DpaRange;
use active::Ask;
pub(super) use active::{ActiveRecall, Declined};

/// A recall that outlives its deadline ends after this long at the latest.
const OVERDUE: Duration = Duration::from_secs(600);
/// The requester hears of progress so often.
const PROGRESS: Duration = Duration::from_millis(50);
/// Receipts kept for `dcm status`.
const HISTORY: usize = 64;
/// Reasons that are told apart of one client's answer.
const REASONS: usize = 64;
/// After the deadline, how long the device may take for what came back before
/// it: the time-out of one command (CXL r3.1 8.2.8.4) and some.
const DEVICE_PATIENCE: Duration = Duration::from_millis(2500);

/// What is asked back.
#[derive(Debug, Clone)]
pub(super) enum Target {
    /// So many bytes, wherever it is cheapest.
    Bytes(u64),
    /// Just these.
    Ranges(Vec<DpaRange>),
}

/// A recall that waits for its turn.
#[derive(Debug)]
pub(super) struct RecallRequest {
    pub(super) origin: Origin,
    pub(super) target: Target,
    pub(super) patience: Duration,
    /// At the deadline the work goes on.
    pub(super) past_deadline: bool,
    /// Who gets the receipt.
    pub(super) requester: Option<ConnectionId>,
    /// It wants to hear how far the recall is.
    pub(super) progress: bool,
    pub(super) requested: Instant,
}

/// The recall under way, those that wait and the receipts of the last ones.
#[derive(Debug, Default)]
pub(super) struct Recalls {
    pub(super) active: Option<ActiveRecall>,
    queue: VecDeque<RecallRequest>,
    pub(super) receipts: VecDeque<Receipt>,
    pub(super) recalls: u64,
    messages: u64,
    /// Something marked may have become free.
    returned: bool,
}

impl Recalls {
    /// An id for a message to a client.
    pub(super) fn next_message(&mut self) -> u64 {
        self.messages += 1;
        self.messages
    }

    /// When the recall under way must end.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.active.as_ref().map(|recall| recall.deadline)
    }

    /// The recall under way, for people.
    pub(super) fn status(
        &self,
        pid_of: impl Fn(ClientId) -> Option<u32>,
        now: Instant,
    ) -> Option<RecallStatus> {
        let recall = self.active.as_ref()?;
        let asks = recall.waiting.values();
        Some(RecallStatus {
            id: recall.receipt.id,
            origin: recall.receipt.origin,
            asked: recall.receipt.asked,
            returned: recall.receipt.returned,
            left_ms: recall.deadline.saturating_duration_since(now).as_millis() as u64,
            waiting: asks
                .filter_map(|ask| {
                    let pid = pid_of(ask.client)?;
                    Some(RecallAsk {
                        pid,
                        bytes: ask.bytes,
                    })
                })
                .collect(),
            queued: self.queue.len() as u64,
        })
    }
}

impl Broker {
    /// Asks for memory back, at once if nothing else is being asked for.
    pub(super) fn recall(&mut self, request: RecallRequest, now: Instant) {
        self.recalls.queue.push_back(request);
        self.start_recalls(now);
    }

    /// Ends what is overdue, and starts what waits.
    pub(super) fn advance_recalls(&mut self, now: Instant) {
        if let Some(recall) = self.recalls.active.take_if(|recall| recall.deadline <= now) {
            self.deadline_passed(recall, now);
        }
        if self.offers_again(now) {
            self.recalls.returned = true;
        }
        if self.recalls.active.is_none() && std::mem::take(&mut self.recalls.returned) {
            self.hand_over(None);
        }
        self.start_recalls(now);
    }

    fn deadline_passed(&mut self, mut recall: ActiveRecall, now: Instant) {
        if recall.closing {
            recall.device_error = Some("the device has not answered".into());
            return self.finish(recall, now);
        }
        if recall.past_deadline && !recall.overdue && !recall.waiting.is_empty() {
            return self.report_and_go_on(recall, now);
        }
        self.claim(&mut recall);
        self.decline_late(&mut recall);
        recall.waiting.clear();
        recall.closing = true;
        recall.deadline = now + DEVICE_PATIENCE;
        self.hand_over(Some(&recall));
        self.go_on(recall, now);
    }

    /// Names those who have not answered.
    fn decline_late(&self, recall: &mut ActiveRecall) {
        let waiting = std::mem::take(&mut recall.waiting);
        for ask in waiting.values() {
            let pid = self.clients.get(&ask.client).map_or(0, |c| c.peer.pid);
            recall.decline(ask, pid, RefusalReason::Deadline);
        }
        recall.waiting = waiting;
    }

    /// The requester gets a receipt of what came until now, and waits no more.
    fn report_and_go_on(&mut self, mut recall: ActiveRecall, now: Instant) {
        let said = recall.declined.len();
        self.decline_late(&mut recall);
        if let Some(requester) = recall.requester.take() {
            let mut receipt = recall.receipt_now(now);
            receipt.refused = self.refusals(&recall);
            receipt.more = true;
            self.reply(requester, &AdminReply::Receipt(receipt), now);
        }
        recall.declined.truncate(said);
        recall.progress = None;
        recall.overdue = true;
        recall.deadline = now + OVERDUE;
        self.recalls.active = Some(recall);
    }

    /// What a client's end left goes on with the recall under way.
    pub(super) fn hand_over_returned(&mut self) {
        let recall = self.recalls.active.take();
        self.hand_over(recall.as_ref());
        self.recalls.active = recall;
    }

    fn start_recalls(&mut self, now: Instant) {
        if !self.knows_use() {
            return;
        }
        if !self.recalls.queue.is_empty()
            && let Some(recall) = self
                .recalls
                .active
                .take_if(|recall| recall.overdue && !recall.closing)
        {
            self.deadline_passed(recall, now);
        }
        while self.recalls.active.is_none() {
            let Some(request) = self.recalls.queue.pop_front() else {
                return;
            };
            self.start(request, now);
        }
    }

    fn start(&mut self, request: RecallRequest, now: Instant) {
        self.recalls.recalls += 1;
        self.counters.recalls += 1;
        let receipt = self.new_receipt(request.origin, &request.target);
        tracing::info!(
            recall = receipt.id,
            origin = %receipt.origin,
            asked = receipt.asked,
            deadline_ms = request.patience.as_millis() as u64,
            "recall starts"
        );
        // Who asks gets an answer of the device's now.
        self.untaken = Untaken::default();
        // Who let go a moment ago keeps nothing.
        self.probe_readers(now, true);
        let mut recall = ActiveRecall {
            receipt,
            target: request.target,
            declined: Vec::new(),
            device_error: None,
            deadline: now + request.patience,
            past_deadline: request.past_deadline,
            overdue: false,
            requester: request.requester,
            progress: request.progress.then_some(now),
            requested: request.requested,
            waiting: BTreeMap::new(),
            spent: BTreeSet::new(),
            claimed: 0,
            said: RecallOutcome::default(),
            unsaid: 0,
            closing: false,
            marked: Vec::new(),
            rounds: 0,
            asked: false,
        };
        if let Target::Ranges(ranges) = &recall.target {
            for range in ranges {
                let wanted = recall.receipt.origin == Origin::Device;
                recall.marked.extend(self.table.mark_range(range, wanted));
                self.stranded.extend(self.table.stranded(range));
            }
        }
        self.claim(&mut recall);
        self.hand_over(Some(&recall));
        self.go_on(recall, now);
    }

    pub(super) fn new_receipt(&self, origin: Origin, target: &Target) -> Receipt {
        let asked = match target {
            Target::Bytes(bytes) => *bytes,
            Target::Ranges(ranges) => ranges.iter().map(|range| range.len).sum(),
        };
        Receipt {
            id: self.recalls.recalls,
            origin,
            asked,
            returned: 0,
            returned_free: 0,
            returned_idle: 0,
            returned_purged: 0,
            returned_dropped: 0,
            returned_to_extents: 0,
            returned_to_dram: 0,
            returned_spilled: 0,
            ranges: Vec::new(),
            refused: Vec::new(),
            copied: 0,
            moving_us: 0,
            stalls: StallTimes::default(),
            duration_us: 0,
            more: false,
        }
    }

    /// Marks free memory for a recall of bytes, before anybody leases it.
    fn claim(&mut self, recall: &mut ActiveRecall) {
        if matches!(recall.target, Target::Bytes(_)) && recall.missing() > 0 {
            recall.claimed += self.table.mark_free(recall.missing());
        }
    }

    /// Something was returned: the recall under way has the first claim to it.
    pub(super) fn claim_for_recall(&mut self) {
        self.recalls.returned = true;
        if let Some(mut recall) = self.recalls.active.take() {
            self.claim(&mut recall);
            self.recalls.active = Some(recall);
        }
    }

    /// Asks the next clients, or ends the recall when there is nobody to ask
    /// and the device has what came back.
    pub(super) fn go_on(&mut self, mut recall: ActiveRecall, now: Instant) {
        if recall.waiting.is_empty() && recall.deadline > now && !recall.closing {
            match recall.target {
                Target::Bytes(_) => self.ask_for_bytes(&mut recall, now),
                Target::Ranges(_) if recall.rounds == 0 => self.ask_for_ranges(&mut recall, now),
                Target::Ranges(_) => {}
            }
            recall.rounds += 1;
        }
        if recall.waiting.is_empty() && self.leaving.is_none() {
            self.finish(recall, now);
        } else {
            self.recalls.active = Some(recall);
        }
    }

    /// Each client is asked for its share of what is missing.
    fn ask_for_bytes(&mut self, recall: &mut ActiveRecall, now: Instant) {
        let missing = recall.missing();
        let holders: Vec<(ClientId, u64)> = self
            .clients
            .iter()
            .filter(|(id, c)| c.connection.is_some() && c.leased > 0 && !recall.spent.contains(id))
            .map(|(id, client)| (*id, client.leased))
            .collect();
        let held: u64 = holders.iter().map(|(_, leased)| leased).sum();
        let mut left = missing;
        // What forks hold is no client's live data, or is so on its way to DRAM.
        for (family, ranges) in self.originals(left) {
            let bytes: u64 = ranges.iter().map(|range| range.len).sum();
            if left > 0 && !recall.spent.contains(&family) {
                left = left.saturating_sub(bytes);
                recall.spent.insert(family);
                self.ask_family(recall, family, &ranges);
            }
        }
        for (id, leased) in holders {
            if left == 0 {
                break;
            }
            let share = u128::from(missing) * u128::from(leased) / u128::from(held);
            let share = (share as u64).next_multiple_of(GRANULE).max(GRANULE);
            let share = share.min(leased);
            left = left.saturating_sub(share);
            self.ask(recall, id, share, &[], now);
        }
    }

    fn ask_for_ranges(&mut self, recall: &mut ActiveRecall, now: Instant) {
        let mut wanted: BTreeMap<ClientId, Vec<WindowRange>> = BTreeMap::new();
        for (client, range) in self.table.marked_leases() {
            wanted.entry(client).or_default().push(range);
        }
        for (client, ranges) in wanted {
            if client.is_family() {
                self.ask_family(recall, client, &ranges);
                continue;
            }
            if self
                .clients
                .get(&client)
                .is_none_or(|c| c.connection.is_none())
            {
                continue;
            }
            for chunk in ranges.chunks(MAX_RANGES) {
                let bytes = chunk.iter().map(|range| range.len).sum();
                self.ask(recall, client, bytes, chunk, now);
            }
        }
    }

    fn ask_family(&mut self, recall: &mut ActiveRecall, family: ClientId, ranges: &[WindowRange]) {
        self.recalls.messages += 1;
        let id = self.recalls.messages;
        let bytes = ranges.iter().map(|range| range.len).sum();
        self.evict(family, id, ranges);
        let ask = Ask {
            client: family,
            bytes,
            refused: 0,
            reasons: 0,
        };
        recall.waiting.insert(id, ask);
        recall.asked = true;
    }

    /// A client has made originals of what is being asked back: its family is
    /// asked for them.
    pub(super) fn recall_shared(&mut self, family: ClientId, shared: &[WindowRange]) {
        let Some(mut recall) = self.recalls.active.take() else {
            return;
        };
        let marked = self.table.marked_within(shared);
        if !marked.is_empty() && !recall.closing {
            self.ask_family(&mut recall, family, &marked);
        }
        self.recalls.active = Some(recall);
    }

    fn ask(
        &mut self,
        recall: &mut ActiveRecall,
        client: ClientId,
        bytes: u64,
        ranges: &[WindowRange],
        now: Instant,
    ) {
        let Some(to) = self.clients.get_mut(&client) else {
            return;
        };
        to.recalls += 1;
        tracing::info!(
            recall = recall.receipt.id,
            pid = to.peer.pid,
            bytes,
            "client asked"
        );
        let connection = to.connection;
        let id = self.recalls.next_message();
        // Some of the time is the broker's, to release what comes back.
        let patience = recall.deadline.saturating_duration_since(now).mul_f32(0.9);
        let message = Message::new(Kind::Recall)
            .with_id(id)
            .with_arg(0, bytes)
            .with_arg(1, patience.as_millis() as u64)
            .with_flags(match recall.past_deadline {
                true => RECALL_PAST_DEADLINE,
                false => 0,
            })
            .with_ranges(ranges);
        self.post(connection, message);
        let ask = Ask {
            client,
            bytes,
            refused: 0,
            reasons: 0,
        };
        recall.waiting.insert(id, ask);
        recall.asked = true;
    }

    /// A client says what it does not return, for one of its reasons.
    pub(super) fn recall_refused(&mut self, client: ClientId, message: &Message) {
        let pid = self.clients.get(&client).map_or(0, |c| c.peer.pid);
        let Some(recall) = &mut self.recalls.active else {
            return;
        };
        let Some(ask) = recall.waiting.get_mut(&message.id()) else {
            return;
        };
        let bytes = message.arg(0).min(ask.bytes - ask.refused);
        if ask.client == client && bytes > 0 {
            ask.refused += bytes;
            ask.reasons += 1;
            let mut said = recall.declined.iter_mut().rev();
            let last = said.find(|said| said.client == client);
            if let Some(last) = last.filter(|_| ask.reasons > REASONS) {
                last.bytes += bytes;
                return;
            }
            recall.declined.push(Declined {
                client,
                pid,
                bytes,
                reason: RefusalReason::from_wire(message.arg(1)),
                ranges: message.ranges(),
            });
        }
    }

    /// A client says what it did. Answers to recalls that are over count for nothing.
    pub(super) fn recall_answered(&mut self, client: ClientId, message: &Message, now: Instant) {
        let Some(mut recall) = self.recalls.active.take() else {
            return;
        };
        let asked = recall.waiting.get_mut(&message.id());
        if let Some(ask) = asked.filter(|ask| ask.client == client) {
            let outcome = RecallOutcome::read(message);
            tracing::info!(
                recall = recall.receipt.id,
                pid = self.clients.get(&client).map(|c| c.peer.pid),
                ?outcome,
                refused = ask.refused,
                "client answered"
            );
            if outcome.more {
                // What it refused until now, it will do or refuse again.
                ask.refused = 0;
                ask.reasons = 0;
                recall.declined.retain(|said| said.client != client);
            } else {
                if ask.refused > 0 || outcome.steps().iter().all(|bytes| *bytes == 0) {
                    recall.spent.insert(client);
                }
                recall.waiting.remove(&message.id());
            }
            // What it moved is to come back when there is capacity.
            if outcome.moved() > 0
                && let Some(client) = self.clients.get_mut(&client)
            {
                client.wants_more();
            }
            recall.hear(&outcome);
            self.claim(&mut recall);
            self.hand_over(Some(&recall));
        }
        self.go_on(recall, now);
        self.tell_progress();
    }

    /// Tells the requester how far the recall is, now and then.
    pub(super) fn tell_progress(&mut self) {
        let now = Instant::now();
        let Some(recall) = &mut self.recalls.active else {
            return;
        };
        if recall.progress.is_none_or(|next| next > now) {
            return;
        }
        recall.progress = Some(now + PROGRESS);
        let asked = recall.receipt.asked;
        let back = match recall.target {
            Target::Bytes(_) => asked - recall.missing(),
            Target::Ranges(_) => {
                let leases = self.table.marked_leases();
                asked.saturating_sub(leases.iter().map(|(_, range)| range.len).sum())
            }
        };
        let message = Message::new(Kind::AdminProgress)
            .with_arg(0, asked)
            .with_arg(1, back);
        let requester = recall.requester;
        self.post(requester, message);
    }

    /// `client` can't answer any more.
    pub(super) fn recall_unanswerable(&mut self, client: ClientId, now: Instant) {
        let Some(mut recall) = self.recalls.active.take() else {
            return;
        };
        let gone: Vec<u64> = recall
            .waiting
            .iter()
            .filter_map(|(id, ask)| (ask.client == client).then_some(*id))
            .collect();
        if gone.is_empty() {
            self.recalls.active = Some(recall);
            return;
        }
        for id in gone {
            if let Some(ask) = recall.waiting.remove(&id)
                && let Some(still) = self.clients.get(&client)
            {
                recall.decline(&ask, still.peer.pid, RefusalReason::Unreachable);
            }
        }
        self.go_on(recall, now);
    }

    fn finish(&mut self, mut recall: ActiveRecall, now: Instant) {
        recall.receipt.refused = self.refusals(&recall);
        // What the device asked for stays marked: it goes once it is free.
        if recall.receipt.origin != Origin::Device {
            self.table.unmark(&recall.marked);
        }
        if recall.receipt.origin == Origin::Policy {
            self.policy.status.given_back_bytes += recall.receipt.returned;
        }
        self.file_receipt(recall.receipt_now(now), recall.requester, now);
    }

    pub(super) fn file_receipt(
        &mut self,
        receipt: Receipt,
        to: Option<ConnectionId>,
        now: Instant,
    ) {
        tracing::info!(
            recall = receipt.id,
            origin = %receipt.origin,
            asked = receipt.asked,
            returned = receipt.returned,
            steps = ?receipt.steps(),
            copied = receipt.copied,
            refused = receipt.refused_bytes(),
            duration_us = receipt.duration_us,
            "recall ends"
        );
        if let Some(requester) = to {
            self.reply(requester, &AdminReply::Receipt(receipt.clone()), now);
        }
        if self.recalls.receipts.len() == HISTORY {
            self.recalls.receipts.pop_front();
        }
        self.recalls.receipts.push_back(receipt);
    }
}
