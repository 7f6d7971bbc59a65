//! What is checked in the guest.

mod device;
mod node;
mod programs;
pub(super) mod served;
mod tests;

use anyhow::Result;

use super::bench::measure;
use super::inside::Guest;
use super::plan::Plan;

/// One check. Each starts with no broker running and leaves none, and no capacity, behind.
#[derive(Debug)]
pub(super) struct Check {
    pub(super) name: &'static str,
    /// What it shows, in a few words.
    pub(super) shows: &'static str,
    /// Whether it runs only when asked for everything.
    pub(super) full: bool,
    pub(super) run: fn(&Guest) -> Result<()>,
}

/// What Debian calls the programs that the checks use.
pub(super) const PACKAGES: &[&str] = &["python3.11", "redis-server", "redis-tools", "sqlite3"];

/// Packages of the workspace, and their test programs that run in the guest.
pub(super) const TESTS: &[(&str, &str)] = &[
    ("dcmalloc-dax-backend", "device"),
    ("dcmalloc-allocator", "rebind_hazards"),
    ("dcmalloc-allocator", "rebind_storm"),
];

pub(super) const ALL: &[Check] = &[
    Check {
        name: "groups",
        shows: "groups of three, eight groups in a row, a group larger than the log: one answer each",
        full: false,
        run: device::groups,
    },
    Check {
        name: "restart",
        shows: "a broker that ends, or is killed, leaves capacity that the next one adopts",
        full: false,
        run: device::restart,
    },
    Check {
        name: "evacuation",
        shows: "capacity is asked back with live data on it: it goes, the data stays",
        full: false,
        run: device::evacuation,
    },
    Check {
        name: "sqlite",
        shows: "a database goes on while all its extents are asked back",
        full: false,
        run: programs::sqlite,
    },
    Check {
        name: "redis",
        shows: "half of a server's extents are asked back while a client writes and reads",
        full: false,
        run: programs::redis,
    },
    Check {
        name: "rebind-storm",
        shows: "granules of /dev/dax move under writers: nothing is lost",
        full: false,
        run: tests::storm,
    },
    Check {
        name: "rebind-hazards",
        shows: "what a program may do to memory in flight, on /dev/dax",
        full: true,
        run: tests::hazards,
    },
    Check {
        name: "device",
        shows: "the driver's device tests, on registers mapped through sysfs",
        full: false,
        run: tests::device,
    },
    Check {
        name: "node",
        shows: "a program on a NUMA node of extents: a block goes, the data stays",
        full: false,
        run: node::node,
    },
];

/// The checks of `plan`, in order.
pub(super) fn chosen(plan: &Plan) -> impl Iterator<Item = &'static Check> {
    let named = |check: &&Check| plan.checks.iter().any(|name| name == check.name);
    let (checks, benches) = (ALL.iter(), measure::ALL.iter());
    let checks = checks.filter(move |check| match plan.checks.is_empty() {
        true => plan.full || !check.full,
        false => named(check),
    });
    checks.chain(benches.filter(named))
}
