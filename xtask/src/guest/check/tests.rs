//! Test programs of the crates, on the guest's device.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::super::inside::Guest;
use super::super::{machine, port};
use super::served::{LIMIT, Served, mib};
use crate::process;
use crate::rung::unit;

/// The tests of moving granules use the first 64 MiB of the window.
const USED: u64 = 64;
/// Long enough for some tens of granules to move on a busy machine.
const STORM_SECONDS: &str = "20";

/// The driver's tests of a device, with their own way to the fabric manager.
pub(super) fn device(guest: &Guest) -> Result<()> {
    let monitor = port::find(machine::MONITOR)?;
    let environment = [
        ("DCM_TEST_DEVICE", "uio"),
        ("DCM_TEST_BDF", &guest.device),
        (
            "DCM_TEST_MONITOR",
            monitor.to_str().context("a path that is no text")?,
        ),
    ];
    // A committed decoder stays so until a reset: the broker's, or the tests' where there is no /dev/dax.
    run(guest, "device", &["--skip", "decoders::"], &environment)
}

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
    let environment = [
        ("REBIND_WINDOW", "/dev/dax0.0"),
        ("REBIND_STORM_SECONDS", STORM_SECONDS),
    ];
    // The judge of the storm moves too little in its third of the time; it runs with the unit tests.
    let result = run(guest, test, &["--skip", "the_storm_notices"], &environment);
    Served::start(guest)?.leave()?;
    result
}

fn run(guest: &Guest, test: &str, options: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let program = guest.plan.tests.get(test).context("not built")?;
    let mut command = Command::new(program);
    command
        .args(["--test-threads=1", "--show-output"])
        .args(options)
        .envs(environment.iter().copied());
    let finished = process::run(&mut command, LIMIT)?;
    eprintln!("{}{}", finished.stdout, finished.stderr);
    let tally = unit::count(&finished.stdout);
    guest.note(format!(
        "{} tests passed, {} can't be made here",
        tally.passed,
        tally.skipped.len()
    ));
    let failed: Vec<&str> = tally.failed.iter().map(|(name, _)| name.as_str()).collect();
    if !failed.is_empty() {
        bail!("{}", failed.join(", "));
    }
    ensure!(finished.success(), "{}", finished.ending());
    ensure!(tally.passed > 0, "no test ran");
    Ok(())
}
