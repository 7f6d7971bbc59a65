//! A broker's numbers in Prometheus' text format (version 0.0.4).
#![forbid(unsafe_code)]

use std::fmt::{Display, Write};

use dax_backend::broker::client_page::{STALL_BUCKETS, STALL_FIRST_POWER};
use dax_backend::broker::status::{ProcessReport, Status};

/// Collects metrics, each with its help and type before its samples.
#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string can't fail.
        let _ = writeln!(self.0, "# HELP dcmalloc_{name} {help}");
        let _ = writeln!(self.0, "# TYPE dcmalloc_{name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.0, "dcmalloc_{name}");
        for (index, (label, value)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{before}{label}=\"{}\"", escaped(value));
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "counter", help);
        self.sample(name, &[], value);
    }

    fn by_process(
        &mut self,
        status: &Status,
        name: &str,
        kind: &str,
        help: &str,
        value: impl Fn(&ProcessReport) -> u64,
    ) {
        self.family(name, kind, help);
        for process in &status.clients {
            let pid = process.pid.to_string();
            let labels = [("pid", &*pid), ("command", &*process.command)];
            self.sample(name, &labels, value(process));
        }
    }
}

/// A label's value: backslash, quote and newline are written with a backslash.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// The page for what was seen last; without it only that nothing was seen.
pub(super) fn render(status: Option<&Status>) -> String {
    let mut page = Page::default();
    page.gauge(
        "up",
        "Whether the broker answers.",
        u8::from(status.is_some()),
    );
    let Some(status) = status else {
        return page.0;
    };
    page.family("broker_info", "gauge", "The broker, as labels.");
    let pid = status.pid.to_string();
    let labels = [("version", &*status.version), ("pid", &*pid)];
    page.sample("broker_info", &labels, 1);
    page.gauge(
        "broker_uptime_seconds",
        "Since the broker started.",
        status.uptime_ms as f64 / 1e3,
    );
    capacity(&mut page, status);
    device(&mut page, status);
    broker(&mut page, status);
    processes(&mut page, status);
    stalls(&mut page, status);
    page.0
}

fn capacity(page: &mut Page, status: &Status) {
    let capacity = &status.capacity;
    page.gauge(
        "capacity_accepted_bytes",
        "Capacity accepted from the device.",
        capacity.accepted,
    );
    page.family(
        "capacity_bytes",
        "gauge",
        "Accepted capacity by what it is; what is with the device at the moment is in none.",
    );
    for (state, bytes) in [
        ("leased", capacity.leased),
        ("dirty", capacity.dirty),
        ("clean", capacity.clean.saturating_sub(capacity.warm)),
        ("warm", capacity.warm),
        ("stranded", capacity.stranded),
        ("shared", capacity.shared),
        ("broken", capacity.broken),
    ] {
        page.sample("capacity_bytes", &[("state", state)], bytes);
    }
    page.gauge(
        "capacity_forked_bytes",
        "Leased, and as it was when a process forked, for parent and children.",
        capacity.forked,
    );
    page.gauge(
        "capacity_outgoing_bytes",
        "Leased or free, and on its way back to the device.",
        capacity.outgoing,
    );
    page.gauge(
        "extents",
        "Extents accepted from the device.",
        status.extents.len(),
    );
}

fn device(page: &mut Page, status: &Status) {
    let counters = &status.device.counters;
    for (name, help, value) in [
        (
            "device_groups_answered_total",
            "More groups answered, each once.",
            counters.groups_answered,
        ),
        (
            "device_extents_accepted_total",
            "Extents accepted.",
            counters.extents_accepted,
        ),
        (
            "device_extents_rejected_total",
            "Extents rejected.",
            counters.extents_rejected,
        ),
        (
            "device_released_bytes_total",
            "Capacity given back.",
            counters.bytes_released,
        ),
        (
            "device_forced_bytes_total",
            "Capacity lost to forced release.",
            counters.bytes_forced,
        ),
        (
            "device_log_overflows_total",
            "Times the event log had run over.",
            counters.overflows,
        ),
        (
            "device_commands_total",
            "Mailbox commands executed.",
            counters.commands,
        ),
        (
            "device_timeouts_total",
            "Mailbox commands that did not end in time.",
            counters.timeouts,
        ),
        (
            "device_retries_total",
            "Mailbox commands repeated because the device was busy.",
            counters.retries,
        ),
    ] {
        page.counter(name, help, value);
    }
}

fn broker(page: &mut Page, status: &Status) {
    let counters = &status.counters;
    for (name, help, value) in [
        (
            "clients_total",
            "Processes that were welcomed.",
            counters.clients,
        ),
        (
            "clients_ended_total",
            "Processes whose leases have ended.",
            counters.clients_ended,
        ),
        (
            "connections_refused_total",
            "Connections turned away.",
            counters.refused,
        ),
        (
            "malformed_total",
            "Messages that made no sense.",
            counters.malformed,
        ),
        ("leases_total", "Lease requests.", counters.leases),
        (
            "granted_bytes_total",
            "Bytes leased out.",
            counters.granted_bytes,
        ),
        (
            "returned_bytes_total",
            "Bytes that came back from processes.",
            counters.returned_bytes,
        ),
        (
            "exhausted_total",
            "Lease requests that could not be filled.",
            counters.exhausted,
        ),
        ("recalls_total", "Recalls.", counters.recalls),
        (
            "wiped_bytes_total",
            "Bytes wiped before the next lease.",
            counters.wiped_bytes,
        ),
    ] {
        page.counter(name, help, value);
    }
    let total = &status.total;
    for (name, help, value) in [
        (
            "recall_returned_bytes_total",
            "Bytes that processes returned on recalls.",
            total.recall_bytes_returned,
        ),
        (
            "recall_refused_bytes_total",
            "Bytes that processes refused on recalls.",
            total.recall_bytes_refused,
        ),
        (
            "evacuated_granules_total",
            "Granules of 2 MiB moved off extents while in use.",
            total.evacuated_granules,
        ),
        (
            "promoted_granules_total",
            "Granules of 2 MiB moved back onto extents.",
            total.promoted_granules,
        ),
        (
            "restored_granules_total",
            "Granules of 2 MiB brought back from spill files.",
            total.restored_granules,
        ),
        (
            "spill_lost_granules_total",
            "Granules of 2 MiB whose spill file could not give them back.",
            total.spill_lost_granules,
        ),
        (
            "lost_granules_total",
            "Granules of 2 MiB that a device took by force while they were in use, or that were broken.",
            total.lost_granules,
        ),
    ] {
        page.counter(name, help, value);
    }
    page.gauge(
        "recalls_in_flight",
        "Recalls under way or waiting.",
        status.recall.as_ref().map_or(0, |recall| 1 + recall.queued),
    );
    if let Some(receipt) = status.receipts.last() {
        page.gauge(
            "last_recall_seconds",
            "How long the last recall took.",
            receipt.duration_us as f64 / 1e6,
        );
    }
}

fn processes(page: &mut Page, status: &Status) {
    page.gauge(
        "processes",
        "Processes that hold leases or may.",
        status.clients.len(),
    );
    page.by_process(
        status,
        "process_leased_bytes",
        "gauge",
        "Leased by a process.",
        |p| p.leased,
    );
    page.by_process(
        status,
        "process_extent_live_bytes",
        "gauge",
        "In use on extents.",
        |p| p.stats.extent_live_bytes,
    );
    page.by_process(
        status,
        "process_dram_live_bytes",
        "gauge",
        "In use in DRAM.",
        |p| p.stats.dram_live_bytes,
    );
    page.by_process(
        status,
        "process_degraded_flags",
        "gauge",
        "What went less well than it should, as bits; 0: nothing.",
        |p| p.stats.degraded_flags,
    );
}

/// Waits for granules that moved, as a histogram.
fn stalls(page: &mut Page, status: &Status) {
    page.family(
        "stall_seconds",
        "histogram",
        "How long threads waited for granules that moved.",
    );
    let total = &status.total;
    let mut sum = 0u64;
    for (bucket, waits) in total.stalls.iter().enumerate() {
        sum = sum.saturating_add(*waits);
        let end = if bucket + 1 < STALL_BUCKETS {
            ((1u64 << (STALL_FIRST_POWER + bucket as u32)) as f64 / 1e9).to_string()
        } else {
            "+Inf".to_owned()
        };
        page.sample("stall_seconds_bucket", &[("le", &*end)], sum);
    }
    page.sample("stall_seconds_sum", &[], total.stall_ns as f64 / 1e9);
    page.sample("stall_seconds_count", &[], sum);
}

#[cfg(test)]
mod tests;
