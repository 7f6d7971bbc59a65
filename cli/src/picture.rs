//! Reports for people.
#![forbid(unsafe_code)]

use std::fmt::Write;

use dax_backend::broker::GRANULE;
use dax_backend::broker::admin::Added;
use dax_backend::broker::client_page::{
    DEGRADED_CONFIG, DEGRADED_DISCONNECTED, DEGRADED_EXHAUSTED, DEGRADED_FOREIGN,
    DEGRADED_NO_REBIND, DEGRADED_NO_RING, DEGRADED_NO_SPILL, DEGRADED_USER_MOVES,
};
use dax_backend::broker::policy::PolicyStatus;
use dax_backend::broker::receipt::Receipt;
use dax_backend::broker::status::{ProcessReport, RunReport, Status};

use crate::size::Bytes;

/// Processes listed one by one, the largest first.
const PROCESSES: usize = 12;
/// Width of an extent's bar.
const BAR: u64 = 32;

macro_rules! line {
    ($out:ident, $($arg:tt)*) => {
        // Writing to a string can't fail.
        let _ = writeln!($out, $($arg)*);
    };
}

/// A broker at one glance.
pub(crate) fn status(status: &Status) -> String {
    let mut out = String::new();
    let (device, capacity) = (&status.device, &status.capacity);
    line!(
        out,
        "broker    pid {}, up {}",
        status.pid,
        duration(status.uptime_ms * 1000)
    );
    line!(
        out,
        "device    {} at DPA {}, {} blocks, {} groups answered",
        Bytes(device.span.len),
        device.span.dpa,
        Bytes(device.block_size),
        device.counters.groups_answered
    );
    if let Some(error) = &device.last_error {
        line!(out, "          last error: {error}");
    }
    line!(
        out,
        "capacity  {} accepted: {} leased, {} free ({} ready as huge pages)",
        Bytes(capacity.accepted),
        Bytes(capacity.leased),
        Bytes(capacity.free),
        Bytes(capacity.warm)
    );
    if capacity.stranded + capacity.outgoing > 0 {
        line!(
            out,
            "          {} in no whole granule, {} on the way back",
            Bytes(capacity.stranded),
            Bytes(capacity.outgoing)
        );
    }
    if capacity.broken + capacity.lost > 0 {
        line!(
            out,
            "          {} broken, {} taken by force and not let go of yet",
            Bytes(capacity.broken),
            Bytes(capacity.lost)
        );
    }
    if capacity.forked > 0 {
        line!(
            out,
            "forks     {} of what is leased is as it was at a fork, for parent and children",
            Bytes(capacity.forked)
        );
    }
    if let Some(why) = &status.pressure.missing {
        line!(out, "pressure  on DRAM is not heard of: {why}");
    } else if status.pressure.seen > 0 {
        line!(
            out,
            "pressure  DRAM was short {} times",
            status.pressure.seen
        );
    }
    policy(&mut out, &status.policy);
    for extent in &status.extents {
        let tag = extent.tag.map(|tag| format!("  tag {tag}"));
        line!(
            out,
            "extent    {:>12} {:>7}  [{}] {} leased{}",
            extent.span.dpa.to_string(),
            Bytes(extent.span.len),
            bar(extent.leased, extent.span.len),
            Bytes(extent.leased),
            tag.unwrap_or_default()
        );
    }
    for shared in &status.shared {
        let gone = if shared.lost { ", taken by force" } else { "" };
        let pids: Vec<String> = shared.pids.iter().map(u32::to_string).collect();
        line!(
            out,
            "shared    tag {}, {} in {} extents{gone}, mapped by {}",
            shared.tag,
            Bytes(shared.bytes),
            shared.extents,
            match pids.is_empty() {
                true => "nobody".to_owned(),
                false => pids.join(", "),
            }
        );
    }
    processes(&mut out, &status.clients);
    for receipt in status.receipts.iter().rev().take(5) {
        line!(
            out,
            "recall    #{} by {}: asked {}, returned {}{}, refused {}, in {}{}",
            receipt.id,
            receipt.origin,
            Bytes(receipt.asked),
            Bytes(receipt.returned),
            steps(receipt),
            Bytes(receipt.refused_bytes()),
            duration(receipt.duration_us),
            stalls(receipt)
        );
    }
    out
}

fn policy(out: &mut String, policy: &PolicyStatus) {
    let Some(rules) = &policy.rules else {
        return;
    };
    line!(
        out,
        "policy    {} to {} free, in steps of {}: asked {} times, got {}, gave back {}, asked programs for what they do not use {} times",
        Bytes(rules.low),
        Bytes(rules.high),
        Bytes(rules.step),
        policy.asked,
        Bytes(policy.added_bytes),
        Bytes(policy.given_back_bytes),
        policy.thinned
    );
    if let Some(refusal) = &policy.last_refusal {
        line!(out, "          refused {} times: {refusal}", policy.refused);
    }
}

/// What a run's memory used.
pub(crate) fn run(report: &RunReport) -> String {
    let mut out = String::new();
    let total = &report.total;
    line!(out, "dcm: memory of {} process(es)", report.processes_total);
    line!(out, "             {:>9} {:>9}", "now", "peak");
    for (what, now, peak) in [
        (
            "on extents",
            total.extent_live_bytes,
            total.extent_live_peak,
        ),
        (
            "  granules",
            total.extent_held_bytes,
            total.extent_held_peak,
        ),
        ("in DRAM", total.dram_live_bytes, total.dram_live_peak),
        (
            "  granules",
            total.dram_granule_bytes,
            total.dram_granule_peak,
        ),
    ] {
        line!(out, "  {what:<10} {:>9} {:>9}", Bytes(now), Bytes(peak));
    }
    match total.share_on_extents() {
        Some(share) => {
            line!(
                out,
                "  {:.1} % of the heap's {} at peak on extents",
                share * 100.0,
                Bytes(total.heap_live_peak)
            );
            if let Some(share) = total.share_over_time() {
                line!(out, "  {:.1} % over time", share * 100.0);
            }
        }
        None => {
            line!(out, "  nothing was allocated");
        }
    }
    line!(
        out,
        "  {} groups answered, {} leases, {} recalls ({} returned, {} refused), extents ran out {} times",
        report.groups_answered,
        total.leases,
        total.recalls,
        Bytes(total.recall_bytes_returned),
        Bytes(total.recall_bytes_refused),
        total.exhausted_count
    );
    let spill = [
        total.spilled_granules,
        total.restored_granules,
        total.spill_lost_granules,
    ];
    if spill != [0; 3] {
        let [now, back, lost] = spill.map(|granules| Bytes(granules.saturating_mul(GRANULE)));
        line!(
            out,
            "  {now} in spill files now, {back} came back from there, {lost} lost there"
        );
    }
    if total.lost_granules > 0 {
        let lost = total.lost_granules.saturating_mul(GRANULE);
        line!(
            out,
            "  {} lost: taken by force while in use, or broken",
            Bytes(lost)
        );
    }
    if total.unforked_granules > 0 {
        line!(
            out,
            "  {} live granules could not be moved before a fork: its child misses them",
            total.unforked_granules
        );
    }
    processes(&mut out, &report.processes);
    out
}

/// What came of a recall.
pub(crate) fn receipt(receipt: &Receipt) -> String {
    let mut out = String::new();
    line!(
        out,
        "asked     {} (recall #{}, {})",
        Bytes(receipt.asked),
        receipt.id,
        duration(receipt.duration_us)
    );
    line!(
        out,
        "returned  {}{}",
        Bytes(receipt.returned),
        steps(receipt)
    );
    for span in &receipt.ranges {
        line!(out, "          {}+{:#x}", span.dpa, span.len);
    }
    if let Some(rate) = receipt.bandwidth() {
        line!(
            out,
            "copied    {} in {}, {}/s{}",
            Bytes(receipt.copied),
            duration(receipt.moving_us),
            Bytes(rate),
            stalls(receipt)
        );
    }
    line!(out, "refused   {}", Bytes(receipt.refused_bytes()));
    for refusal in &receipt.refused {
        let place = refusal.dpa.map(|dpa| format!("{dpa}+"));
        let pid = refusal.pid.map(|pid| format!(" (pid {pid})"));
        let detail = refusal.detail.as_ref().map(|detail| format!(": {detail}"));
        line!(
            out,
            "          {}{}: {}{}{}",
            place.unwrap_or_default(),
            Bytes(refusal.len),
            refusal.reason,
            pid.unwrap_or_default(),
            detail.unwrap_or_default()
        );
    }
    if receipt.more {
        line!(out, "the work goes on: dcm status shows what comes of it");
    }
    out
}

/// What each step of the chain returned, if any did.
fn steps(receipt: &Receipt) -> String {
    let steps = receipt.steps().into_iter().filter(|(_, bytes)| *bytes > 0);
    let steps: Vec<String> = steps
        .map(|(step, bytes)| format!("{} {step}", Bytes(bytes)))
        .collect();
    match steps.is_empty() {
        true => String::new(),
        false => format!(" ({})", steps.join(", ")),
    }
}

/// How long threads waited, if any did.
fn stalls(receipt: &Receipt) -> String {
    let stalls = &receipt.stalls;
    match stalls.count {
        0 => String::new(),
        count => format!(
            "; {count} waits: p50 {}, p99 {}, at most {}",
            duration(stalls.p50 / 1000),
            duration(stalls.p99 / 1000),
            duration(stalls.max / 1000)
        ),
    }
}

/// What came of an offer.
pub(crate) fn added(added: &Added) -> String {
    let mut out = String::new();
    line!(
        out,
        "accepted  {} of {} in {}",
        Bytes(added.accepted.iter().map(|span| span.len).sum()),
        Bytes(added.offered.iter().map(|span| span.len).sum()),
        duration(added.duration_us)
    );
    for span in &added.accepted {
        line!(out, "          {}+{:#x}", span.dpa, span.len);
    }
    for rejected in &added.rejected {
        line!(
            out,
            "rejected  {}+{:#x}: {}",
            rejected.span.dpa,
            rejected.span.len,
            rejected.reason
        );
    }
    out
}

fn processes(out: &mut String, processes: &[ProcessReport]) {
    let mut largest: Vec<&ProcessReport> = processes.iter().collect();
    largest.sort_by_key(|process| std::cmp::Reverse(process.leased_peak));
    for process in largest.iter().take(PROCESSES) {
        let stats = &process.stats;
        line!(
            out,
            "process   {:>7} {:<15} leased {} (at most {}), live on extents {} (at most {}), in DRAM {} (at most {})",
            process.pid,
            process.command,
            Bytes(process.leased),
            Bytes(process.leased_peak),
            Bytes(stats.extent_live_bytes),
            Bytes(stats.extent_live_peak),
            Bytes(stats.dram_live_bytes),
            Bytes(stats.dram_live_peak)
        );
        if stats.unforked_granules > 0 {
            line!(
                out,
                "          {} live granules missing in its children",
                stats.unforked_granules
            );
        }
        for (granules, what) in [
            (
                stats.lost_granules,
                "lost: taken by force while in use, or broken",
            ),
            (stats.pinned_granules, "pinned: no recall gets it"),
        ] {
            if granules > 0 {
                let bytes = Bytes(granules.saturating_mul(GRANULE));
                line!(out, "          {bytes} {what}");
            }
        }
        for says in degraded(stats.degraded_flags) {
            line!(out, "          degraded: {says}");
        }
    }
    if let Some(more) = processes
        .len()
        .checked_sub(PROCESSES)
        .filter(|more| *more > 0)
    {
        line!(out, "          and {more} smaller ones");
    }
}

fn bar(part: u64, whole: u64) -> String {
    let filled = (u128::from(part) * u128::from(BAR)).div_ceil(u128::from(whole.max(1)));
    let filled = (filled as u64).min(BAR) as usize;
    "#".repeat(filled) + &".".repeat(BAR as usize - filled)
}

/// What the `DEGRADED_*` bits of a process say.
pub(crate) fn degraded(flags: u64) -> Vec<&'static str> {
    [
        (DEGRADED_DISCONNECTED, "lost its broker"),
        (DEGRADED_NO_REBIND, "can't move live memory"),
        (
            DEGRADED_USER_MOVES,
            "moves live memory, and system calls that meet it fail (moves:user)",
        ),
        (DEGRADED_EXHAUSTED, "extents ran out"),
        (
            DEGRADED_CONFIG,
            "settings were ignored: confirm_conf:true names them",
        ),
        (
            DEGRADED_FOREIGN,
            "freed blocks of another allocator, which were left alone",
        ),
        (DEGRADED_NO_SPILL, "can't make a file in spill_dir"),
        (DEGRADED_NO_RING, "spills one write at a time (no io_uring)"),
    ]
    .into_iter()
    .filter_map(|(flag, says)| (flags & flag != 0).then_some(says))
    .collect()
}

/// Microseconds for people.
pub(crate) fn duration(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        1_000_000..120_000_000 => format!("{:.1} s", us as f64 / 1e6),
        120_000_000..7_200_000_000 => format!("{} min", us / 60_000_000),
        _ => format!("{} h {} min", us / 3_600_000_000, us / 60_000_000 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dax_backend::broker::receipt::{DpaSpan, HexDpa, Origin, Refusal};
    use dax_backend::broker::{RefusalReason, StallTimes};

    #[test]
    fn a_receipt_names_what_was_refused_and_why() {
        let text = receipt(&Receipt {
            id: 3,
            origin: Origin::Operator,
            asked: 6 << 20,
            returned: 14 << 20,
            returned_free: 2 << 20,
            returned_idle: 0,
            returned_purged: 4 << 20,
            returned_dropped: 0,
            returned_to_extents: 0,
            returned_to_dram: 8 << 20,
            returned_spilled: 0,
            ranges: vec![DpaSpan {
                dpa: HexDpa(0x2000_0000),
                len: 2 << 20,
            }],
            refused: vec![Refusal {
                dpa: Some(HexDpa(0x2020_0000)),
                len: 4 << 20,
                reason: RefusalReason::Deadline,
                pid: Some(42),
                detail: None,
            }],
            copied: 6 << 20,
            moving_us: 1000,
            stalls: StallTimes {
                count: 3,
                p50: 10_000,
                p99: 20_000,
                max: 30_000,
            },
            duration_us: 1500,
            more: false,
        });
        for part in [
            "asked     6M",
            "returned  14M (2M free, 4M purged, 8M moved to DRAM)",
            "3 waits: p50 10 us, p99 20 us, at most 30 us",
            "1.5 ms",
            "0x20000000+0x200000",
            "0x20200000+4M: the client did not answer by the deadline (pid 42)",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }

    #[test]
    fn bars_show_the_least_use_and_never_overflow() {
        assert_eq!(bar(0, 100), ".".repeat(32));
        assert_eq!(bar(1, 1 << 30), "#".to_owned() + &".".repeat(31));
        assert_eq!(bar(100, 100), "#".repeat(32));
        assert_eq!(bar(0, 0), ".".repeat(32));
    }
}
