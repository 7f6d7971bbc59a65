//! clippy, with warnings as errors.

use anyhow::Result;

use super::Tally;
use crate::{process, workspace};

pub(super) fn run() -> Result<Tally> {
    let mut tally = Tally::default();
    // Checked, not linked: without libFuzzer it takes a second beside what the workspace needs.
    let mut fuzz = workspace::cargo();
    fuzz.args([
        "clippy",
        "--quiet",
        "--all-targets",
        "--no-default-features",
    ])
    .args(["--manifest-path", "fuzz/Cargo.toml", "--target-dir"])
    .arg(workspace::target())
    .args(["--", "--deny", "warnings"]);
    if process::run_visibly(&mut fuzz)? {
        tally.pass();
    } else {
        tally.fail("the fuzz targets", "see the lints above");
    }
    let mut clippy = workspace::cargo();
    clippy.args([
        "clippy",
        "--quiet",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ]);
    if process::run_visibly(&mut clippy)? {
        tally.pass();
    } else {
        tally.fail("clippy", "see the lints above");
    }
    Ok(tally)
}
