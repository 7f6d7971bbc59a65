//! Who kept what, and why: the refusing half of a receipt.
#![forbid(unsafe_code)]

use super::protocol::{GRANULE, RefusalReason, WindowRange};
use super::recall::{ActiveRecall, Declined, Target};
use super::receipt::{HexDpa, Refusal};
use super::server::Broker;
use crate::address::{Dpa, DpaRange};

/// Shared memory, and a process that maps it.
pub(super) type SharedPart = (WindowRange, Option<u32>);

impl Broker {
    /// Names everything that was asked for and is not returned.
    pub(super) fn refusals(&self, recall: &ActiveRecall) -> Vec<Refusal> {
        match &recall.target {
            Target::Bytes(_) => self.refused_bytes(recall),
            Target::Ranges(ranges) => ranges
                .iter()
                .flat_map(|range| self.refused_range(recall, range))
                .collect(),
        }
    }

    /// For a recall of bytes: the clients' own words first, until they explain
    /// what is missing; then what the broker itself knows.
    fn refused_bytes(&self, recall: &ActiveRecall) -> Vec<Refusal> {
        let mut missing = recall.receipt.asked.saturating_sub(recall.receipt.returned);
        let mut refused = Vec::new();
        let mut explain = |bytes: u64, reason, pid, detail| {
            let len = bytes.min(missing);
            missing -= len;
            if len > 0 {
                refused.push(Refusal {
                    dpa: None,
                    len,
                    reason,
                    pid,
                    detail,
                });
            }
        };
        for declined in &recall.declined {
            explain(declined.bytes, declined.reason, Some(declined.pid), None);
        }
        for client in self.clients.values() {
            if client.connection.is_none() {
                let pid = Some(client.peer.pid);
                explain(client.leased, RefusalReason::Unreachable, pid, None);
            }
        }
        for (free, tagged) in self.table.free_in(&self.device.span()) {
            // What is free and went nowhere was no whole block or no whole tag,
            // or the device would not have it.
            let (reason, detail) = why_free_stayed(recall, tagged);
            explain(free.len, reason, None, detail);
        }
        for client in self.clients.values() {
            let pid = Some(client.peer.pid);
            explain(client.leased, RefusalReason::Deadline, pid, None);
        }
        for (shared, _) in self.table.shared_in(&self.device.span()) {
            explain(shared.len, RefusalReason::Shared, None, None);
        }
        explain(u64::MAX, RefusalReason::NotAccepted, None, None);
        refused
    }

    fn refused_range(&self, recall: &ActiveRecall, range: &DpaRange) -> Vec<Refusal> {
        let mut refused = Vec::new();
        let mut missing = range.len;
        for span in &recall.receipt.ranges {
            let gone = DpaRange {
                start: Dpa(span.dpa.0),
                len: span.len,
            };
            let part = gone.intersection(range).map_or(0, |part| part.len);
            missing = missing.saturating_sub(part);
        }
        let mut explain = |part: DpaRange, reason, pid, detail| {
            missing = missing.saturating_sub(part.len);
            refused.push(Refusal {
                dpa: Some(HexDpa(part.start.0)),
                len: part.len,
                reason,
                pid,
                detail,
            });
        };
        for (client, leased) in self.table.marked_leases() {
            let holder = self.clients.get(&client);
            let pid = holder.map(|c| c.peer.pid);
            let connected = holder.is_some_and(|c| c.connection.is_some());
            let silent = if connected {
                RefusalReason::Deadline
            } else {
                RefusalReason::Unreachable
            };
            let said = recall.declined.iter().filter(|d| d.client == client);
            for (run, reason) in by_reason(leased, |granule| {
                reason_for(said.clone(), granule).unwrap_or(silent)
            }) {
                if let Some(part) = self.table.dpa(run).intersection(range) {
                    explain(part, reason, pid, None);
                }
            }
        }
        for (free, tagged) in self.table.free_in(range) {
            let (reason, detail) = why_free_stayed(recall, tagged);
            explain(free, reason, None, detail);
        }
        for (shared, tag) in self.table.shared_in(range) {
            match self.readers.pid_of(tag) {
                Some(pid) => explain(shared, RefusalReason::SharedMapped, Some(pid), None),
                None => {
                    let (reason, detail) = why_free_stayed(recall, true);
                    explain(shared, reason, None, detail);
                }
            }
        }
        if missing > 0 {
            refused.push(Refusal {
                dpa: None,
                len: missing,
                reason: RefusalReason::NotAccepted,
                pid: None,
                detail: None,
            });
        }
        refused
    }

    /// `range` of the window, kept by `pid`.
    pub(super) fn refusal_of(
        &self,
        range: WindowRange,
        reason: RefusalReason,
        pid: Option<u32>,
    ) -> Refusal {
        Refusal {
            dpa: Some(HexDpa(self.table.dpa(range).start.0)),
            len: range.len,
            reason,
            pid,
            detail: None,
        }
    }
}

fn why_free_stayed(recall: &ActiveRecall, tagged: bool) -> (RefusalReason, Option<String>) {
    match (&recall.device_error, tagged) {
        (Some(error), _) => (RefusalReason::Device, Some(error.clone())),
        (None, true) => (RefusalReason::TagInUse, None),
        (None, false) => (RefusalReason::BlockInUse, None),
    }
}

/// The runs of granules in `range` that have the same reason.
fn by_reason(
    range: WindowRange,
    reason: impl Fn(WindowRange) -> RefusalReason,
) -> Vec<(WindowRange, RefusalReason)> {
    let mut runs: Vec<(WindowRange, RefusalReason)> = Vec::new();
    let mut offset = range.offset;
    while offset < range.end() {
        let len = GRANULE.min(range.end() - offset);
        let granule = WindowRange { offset, len };
        let why = reason(granule);
        match runs.last_mut() {
            Some((run, same)) if *same == why => run.len += len,
            _ => runs.push((granule, why)),
        }
        offset += len;
    }
    runs
}

/// What a client said about `range` itself, or else about anything.
fn reason_for<'a>(
    said: impl Iterator<Item = &'a Declined> + Clone,
    range: WindowRange,
) -> Option<RefusalReason> {
    let names = |declined: &&Declined| {
        let mut named = declined.ranges.as_slice().iter();
        named.any(|r| r.offset < range.end() && range.offset < r.end())
    };
    said.clone()
        .find(names)
        .or_else(|| said.clone().next())
        .map(|declined| declined.reason)
}
