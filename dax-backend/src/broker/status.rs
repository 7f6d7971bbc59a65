//! What the broker tells about itself: `dcm status`, and `dcm run --stats`.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::client_page::{ClientStats, STALL_BUCKETS};
use super::map::MapRun;
use super::policy::PolicyStatus;
use super::pressure::PressureStatus;
use super::receipt::{DpaSpan, Origin, Receipt};
use crate::capacity::DeviceCounters;

/// Everything about a broker at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Process id of the broker.
    pub pid: u32,
    /// Process id of the keeper that starts another broker when this one dies.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub keeper: Option<u32>,
    /// How often it has done so.
    #[serde(default)]
    pub restarts: u64,
    /// Its user.
    pub uid: u32,
    /// Its release.
    pub version: String,
    /// Milliseconds since it started.
    pub uptime_ms: u64,
    /// Whether it can ask somebody for more capacity (`dcm add`).
    pub orchestrator: bool,
    /// The device.
    pub device: DeviceStatus,
    /// Its capacity.
    pub capacity: Capacity,
    /// Accepted extents, in order of DPA.
    pub extents: Vec<ExtentStatus>,
    /// Tags of capacity that is shared with other hosts.
    #[serde(default)]
    pub shared: Vec<SharedTag>,
    /// Processes that hold leases or may ask for them.
    pub clients: Vec<ProcessReport>,
    /// Sums over all processes that ever were clients.
    pub total: RunTotal,
    /// Counts since the broker started.
    pub counters: BrokerCounters,
    /// Whether pressure on the host's DRAM is heard of.
    #[serde(default)]
    pub pressure: PressureStatus,
    /// What the capacity policy is, and has done.
    #[serde(default)]
    pub policy: PolicyStatus,
    /// The recall under way.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub recall: Option<RecallStatus>,
    /// The last recalls, newest last.
    pub receipts: Vec<Receipt>,
}

/// The device below the broker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// From the lowest DC region to the end of the highest one.
    pub span: DpaSpan,
    /// Its unit of capacity in bytes.
    pub block_size: u64,
    /// Its driver's counts.
    pub counters: DeviceCounters,
    /// The last thing that went wrong with it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_error: Option<String>,
}

/// Bytes of accepted capacity by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Accepted from the device.
    pub accepted: u64,
    /// Leased to processes.
    pub leased: u64,
    /// Part of it: as it was when a process forked, for parent and children.
    #[serde(default)]
    pub forked: u64,
    /// Free; the three below are part of it.
    pub free: u64,
    /// Free, waiting to be wiped.
    pub dirty: u64,
    /// Free and zero.
    pub clean: u64,
    /// Free, zero and present as huge pages.
    pub warm: u64,
    /// Accepted, but in no whole granule: not usable.
    pub stranded: u64,
    /// Leased or free, and on its way back to the device.
    pub outgoing: u64,
    /// Taken by the device while leased, and not let go of by its holders.
    #[serde(default)]
    pub lost: u64,
    /// Accepted, but faulted when it was to be wiped: of no use.
    #[serde(default)]
    pub broken: u64,
    /// Shared with other hosts: to be mapped read-only, and leased to nobody.
    #[serde(default)]
    pub shared: u64,
}

/// One accepted extent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExtentStatus {
    /// Where it is.
    #[serde(flatten)]
    pub span: DpaSpan,
    /// Its tag, if it has one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tag: Option<Uuid>,
    /// Bytes leased.
    pub leased: u64,
    /// Who holds what, from the first whole granule of the extent on.
    pub map: Vec<MapRun>,
}

/// Capacity that is shared with other hosts, by its tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedTag {
    /// The tag.
    pub tag: Uuid,
    /// Bytes of all its extents; 0 if it is gone.
    pub bytes: u64,
    /// How many extents.
    pub extents: u64,
    /// The device has taken it, and some still map where it was.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub lost: bool,
    /// Processes that map it.
    pub pids: Vec<u32>,
}

/// A recall that has not ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecallStatus {
    /// Number of the recall, from 1.
    pub id: u64,
    /// Who asked.
    pub origin: Origin,
    /// Bytes asked for.
    pub asked: u64,
    /// Bytes that the device has back already.
    pub returned: u64,
    /// Milliseconds until the deadline.
    pub left_ms: u64,
    /// Processes that have not answered.
    pub waiting: Vec<RecallAsk>,
    /// Further recalls that wait for this one to end.
    pub queued: u64,
}

/// What a process was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecallAsk {
    /// The process.
    pub pid: u32,
    /// Bytes.
    pub bytes: u64,
}

/// One process, alive or ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessReport {
    /// Process id.
    pub pid: u32,
    /// User.
    pub uid: u32,
    /// Its name (comm) when it connected.
    pub command: String,
    /// The `dcm run` it belongs to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub run: Option<Uuid>,
    /// Whether it can still be asked.
    pub connected: bool,
    /// Whether its leases have ended.
    pub ended: bool,
    /// Bytes leased now.
    pub leased: u64,
    /// Highest `leased`.
    pub leased_peak: u64,
    /// Lease requests it has made.
    pub leases: u64,
    /// Recalls it was sent.
    pub recalls: u64,
    /// What it counts itself.
    pub stats: ClientStats,
}

/// What became of all processes of one `dcm run`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct RunReport {
    /// Processes that ever connected.
    pub processes_total: u64,
    /// Of these: still holding leases or able to ask for them.
    pub processes_live: u64,
    /// The sum over all of them.
    pub total: RunTotal,
    /// The processes; of those that ended, the last [`Self::KEPT`].
    pub processes: Vec<ProcessReport>,
    /// Groups the device has answered, for whomever.
    pub groups_answered: u64,
}

impl RunReport {
    /// Ended processes kept one by one; older ones are in the total only.
    pub const KEPT: usize = 256;
}

/// Sums over the processes of a run. Peaks are sums of each process's own peak.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunTotal {
    /// Bytes of live objects on extents now.
    pub extent_live_bytes: u64,
    /// Bytes of live objects in DRAM now.
    pub dram_live_bytes: u64,
    /// Bytes of granules backed by extents now.
    pub extent_held_bytes: u64,
    /// Bytes of granules backed by DRAM now.
    pub dram_granule_bytes: u64,
    /// Live bytes on extents, at most.
    pub extent_live_peak: u64,
    /// Live bytes in DRAM, at most.
    pub dram_live_peak: u64,
    /// Bytes of granules backed by extents, at most.
    pub extent_held_peak: u64,
    /// Bytes of granules backed by DRAM, at most.
    pub dram_granule_peak: u64,
    /// Live bytes in all, at most.
    pub heap_live_peak: u64,
    /// Of `heap_live_peak`: on extents, in bytes.
    pub heap_live_peak_on_extents: u64,
    /// What was in use over the lives of the processes: a sum of KiB times ms.
    #[serde(default)]
    pub heap_over_time: u64,
    /// The part of `heap_over_time` that lay on extents.
    #[serde(default)]
    pub heap_over_time_on_extents: u64,
    /// Lease requests.
    pub leases: u64,
    /// Recalls sent.
    pub recalls: u64,
    /// Bytes returned on recalls.
    pub recall_bytes_returned: u64,
    /// Bytes refused on recalls.
    pub recall_bytes_refused: u64,
    /// Granules moved off extents while live.
    pub evacuated_granules: u64,
    /// Granules moved back onto extents.
    pub promoted_granules: u64,
    /// Live granules that forks left out.
    #[serde(default)]
    pub unforked_granules: u64,
    /// Granules of which the content is in a file now.
    #[serde(default)]
    pub spilled_granules: u64,
    /// Granules that came back from a file.
    #[serde(default)]
    pub restored_granules: u64,
    /// Granules whose file did not hold any more what was written.
    #[serde(default)]
    pub spill_lost_granules: u64,
    /// Granules that a device took by force, or that were found broken.
    #[serde(default)]
    pub lost_granules: u64,
    /// Granules that are pinned now.
    #[serde(default)]
    pub pinned_granules: u64,
    /// Times that extents ran out for a process.
    pub exhausted_count: u64,
    /// All `DEGRADED_*` bits of all processes.
    pub degraded_flags: u64,
    /// Nanoseconds that threads waited for granules that moved, all together.
    #[serde(default)]
    pub stall_ns: u64,
    /// Waits for granules that moved, by their length (see
    /// [`ClientPage::stalls`](super::client_page::ClientPage::stalls)).
    #[serde(default)]
    pub stalls: [u64; STALL_BUCKETS],
}

impl RunTotal {
    /// Adds what `process` has to say. What an ended process held, it holds no
    /// more. Saturating: the numbers come from a page that the process writes.
    pub(super) fn add(&mut self, process: &ProcessReport) {
        let stats = &process.stats;
        let add = |sum: &mut u64, value: u64| *sum = sum.saturating_add(value);
        if !process.ended {
            add(&mut self.extent_live_bytes, stats.extent_live_bytes);
            add(&mut self.dram_live_bytes, stats.dram_live_bytes);
            add(&mut self.extent_held_bytes, stats.extent_held_bytes);
            add(&mut self.dram_granule_bytes, stats.dram_granule_bytes);
            add(&mut self.spilled_granules, stats.spilled_granules);
            add(&mut self.pinned_granules, stats.pinned_granules);
        }
        add(&mut self.extent_live_peak, stats.extent_live_peak);
        add(&mut self.dram_live_peak, stats.dram_live_peak);
        add(&mut self.extent_held_peak, stats.extent_held_peak);
        add(&mut self.dram_granule_peak, stats.dram_granule_peak);
        add(&mut self.heap_live_peak, stats.heap_live_peak_total);
        let share = u128::from(stats.extent_share_at_peak.min(10_000));
        let on_extents = u128::from(stats.heap_live_peak_total) * share / 10_000;
        add(&mut self.heap_live_peak_on_extents, on_extents as u64);
        add(&mut self.heap_over_time, stats.live_over_time);
        add(&mut self.heap_over_time_on_extents, stats.extents_over_time);
        add(&mut self.leases, process.leases);
        add(&mut self.recalls, process.recalls);
        add(&mut self.recall_bytes_returned, stats.recall_bytes_returned);
        add(&mut self.recall_bytes_refused, stats.recall_bytes_refused);
        add(&mut self.evacuated_granules, stats.evacuated_granules);
        add(&mut self.promoted_granules, stats.promoted_granules);
        add(&mut self.unforked_granules, stats.unforked_granules);
        add(&mut self.restored_granules, stats.restored_granules);
        add(&mut self.spill_lost_granules, stats.spill_lost_granules);
        add(&mut self.lost_granules, stats.lost_granules);
        add(&mut self.exhausted_count, stats.exhausted_count);
        add(&mut self.stall_ns, stats.stall_ns);
        for (sum, waits) in self.stalls.iter_mut().zip(stats.stalls) {
            add(sum, waits);
        }
        self.degraded_flags |= stats.degraded_flags;
    }

    /// Share of the peak on extents, 0.0 to 1.0; `None` when nothing was allocated.
    pub fn share_on_extents(&self) -> Option<f64> {
        (self.heap_live_peak > 0)
            .then(|| self.heap_live_peak_on_extents as f64 / self.heap_live_peak as f64)
    }

    /// Share of what was in use over the lives of the processes that lay on
    /// extents, 0.0 to 1.0; `None` before there is anything to say.
    pub fn share_over_time(&self) -> Option<f64> {
        (self.heap_over_time > 0)
            .then(|| self.heap_over_time_on_extents as f64 / self.heap_over_time as f64)
    }
}

/// Counts since the broker started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerCounters {
    /// Clients that were welcomed.
    pub clients: u64,
    /// Clients taken over from a broker that died.
    #[serde(default)]
    pub clients_adopted: u64,
    /// Clients that came back after their connection broke.
    #[serde(default)]
    pub rejoined: u64,
    /// Clients whose leases have ended.
    pub clients_ended: u64,
    /// Connections turned away.
    pub refused: u64,
    /// Messages that made no sense.
    pub malformed: u64,
    /// Lease requests.
    pub leases: u64,
    /// Bytes granted.
    pub granted_bytes: u64,
    /// Bytes given back by clients or taken back after they ended.
    pub returned_bytes: u64,
    /// Lease requests that could not be filled.
    pub exhausted: u64,
    /// Recalls.
    pub recalls: u64,
    /// Bytes of leases that forks made originals of.
    #[serde(default)]
    pub forked_bytes: u64,
    /// Bytes wiped.
    pub wiped_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_has_spilled_pinned_and_lost_what_its_processes_have() {
        let process = |ended: bool| ProcessReport {
            pid: 1,
            uid: 0,
            command: String::new(),
            run: None,
            connected: !ended,
            ended,
            leased: 0,
            leased_peak: 0,
            leases: 0,
            recalls: 0,
            stats: ClientStats {
                spilled_granules: 5,
                restored_granules: 3,
                spill_lost_granules: 1,
                lost_granules: 4,
                pinned_granules: 7,
                ..ClientStats::default()
            },
        };
        let mut total = RunTotal::default();
        total.add(&process(false));
        total.add(&process(true));
        // The file of one that has ended is gone, and so are its pins.
        assert_eq!((total.spilled_granules, total.pinned_granules), (5, 7));
        assert_eq!(total.lost_granules, 8);
        assert_eq!((total.restored_granules, total.spill_lost_granules), (6, 2));
    }
}
