//! A broker's status as tests want it: two processes, a recall under way.
#![forbid(unsafe_code)]

use dax_backend::broker::status::Status;
use serde_json::json;

const MIB: u64 = 1 << 20;

/// Two extents of 16 MiB and 8 MiB, held by processes 41 and 42.
pub(crate) fn status() -> Status {
    let process = |pid: u32, command: &str, leased: u64| {
        let stats = dax_backend::broker::ClientStats {
            extent_live_bytes: leased,
            evacuated_granules: 3,
            move_stall_max_ns: 1_500_000,
            ..Default::default()
        };
        json!({
            "pid": pid, "uid": 0, "command": command, "connected": true, "ended": false,
            "leased": leased, "leased_peak": leased, "leases": 2, "recalls": 1, "stats": stats,
        })
    };
    let mut stalls = [0u64; 24];
    stalls[5] = 10;
    stalls[10] = 1;
    let total = dax_backend::broker::status::RunTotal {
        stalls,
        stall_ns: 1_900_000,
        ..Default::default()
    };
    let device = dax_backend::capacity::DeviceCounters::default();
    let counters = dax_backend::broker::status::BrokerCounters::default();
    let status = json!({
        "pid": 7, "uid": 0, "version": "0.1.0", "uptime_ms": 61_000, "orchestrator": true,
        "device": {"span": {"dpa": "0x10000000", "len": 64 * MIB}, "block_size": 2 * MIB, "counters": device},
        "capacity": {
            "accepted": 24 * MIB, "leased": 14 * MIB, "free": 10 * MIB, "dirty": 2 * MIB,
            "clean": 8 * MIB, "warm": 4 * MIB, "stranded": 0, "outgoing": 2 * MIB,
        },
        "extents": [
            {"dpa": "0x10000000", "len": 16 * MIB, "leased": 12 * MIB, "map": [
                {"len": 8 * MIB, "state": "leased", "pid": 41},
                {"len": 4 * MIB, "state": "leased", "pid": 42},
                {"len": 2 * MIB, "state": "dirty"},
                {"len": 2 * MIB, "state": "clean"},
            ]},
            {"dpa": "0x11000000", "len": 8 * MIB, "leased": 2 * MIB, "map": [
                {"len": 2 * MIB, "state": "leased", "pid": 42, "outgoing": true},
                {"len": 6 * MIB, "state": "warm"},
            ]},
        ],
        "clients": [process(41, "valkey-server", 8 * MIB), process(42, "sqlite3", 6 * MIB)],
        "total": total,
        "counters": counters,
        "recall": {
            "id": 9, "origin": "operator", "asked": 8 * MIB, "returned": 2 * MIB, "left_ms": 1200,
            "waiting": [{"pid": 42, "bytes": 2 * MIB}], "queued": 0,
        },
        "receipts": [{
            "id": 8, "origin": "device", "asked": 6 * MIB, "returned": 4 * MIB, "returned_free": 2 * MIB,
            "returned_idle": 0, "returned_purged": 0, "returned_dropped": 0, "returned_to_extents": 0,
            "returned_to_dram": 2 * MIB, "returned_spilled": 0, "ranges": [],
            "copied": 2 * MIB, "moving_us": 500, "stalls": {"count": 0, "p50": 0, "p99": 0, "max": 0},
            "refused": [{"len": 2 * MIB, "reason": "pinned", "pid": 41}], "duration_us": 2500,
        }],
    });
    serde_json::from_value(status).expect("a status")
}
