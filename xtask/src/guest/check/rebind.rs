//! The allocator's own tests of moving granules, with `/dev/dax0.0` for a window.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::super::inside::Guest;
use super::served::{LIMIT, Served, mib};
use crate::process;
use crate::rung::unit;

/// The tests use the first 64 MiB of the window.
const USED: u64 = 64;
/// Long enough for some tens of granules to move on a busy machine.
const STORM_SECONDS: &str = "20";

pub(super) fn storm(guest: &Guest) -> Result<()> {
    on_the_window(guest, "rebind_storm")
}

pub(super) fn hazards(guest: &Guest) -> Result<()> {
    on_the_window(guest, "rebind_hazards")
}

/// A broker accepts capacity and ends; the window stays, and is the test's alone.
fn on_the_window(guest: &Guest, test: &str) -> Result<()> {
    let served = Served::with(guest, &[mib(0, USED)])?;
    served.broker.end(Signal::TERM)?;
    let result = run(guest, test);
    Served::start(guest)?.leave()?;
    result
}

fn run(guest: &Guest, test: &str) -> Result<()> {
    let program = guest.plan.tests.get(test).context("not built")?;
    let mut command = Command::new(program);
    command
        .args(["--test-threads=1", "--show-output"])
        // The judge of the storm moves too little in its third of the time; it runs with the unit tests.
        .args(["--skip", "the_storm_notices"])
        .env("REBIND_WINDOW", "/dev/dax0.0")
        .env("REBIND_STORM_SECONDS", STORM_SECONDS);
    let finished = process::run(&mut command, LIMIT)?;
    eprintln!("{}{}", finished.stdout, finished.stderr);
    let tally = unit::count(&finished.stdout);
    guest.note(format!("{} tests passed", tally.passed));
    for (name, reason) in &tally.skipped {
        guest.note(format!("SKIPPED {name}: {reason}"));
    }
    let failed: Vec<&str> = tally.failed.iter().map(|(name, _)| name.as_str()).collect();
    if !failed.is_empty() {
        bail!("{}", failed.join(", "));
    }
    ensure!(finished.success(), "{}", finished.ending());
    ensure!(tally.passed > 0, "no test ran");
    Ok(())
}
