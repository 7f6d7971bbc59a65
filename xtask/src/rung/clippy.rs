//! clippy, with warnings as errors.

use anyhow::Result;

use super::Tally;
use crate::{process, workspace};

pub(super) fn run() -> Result<Tally> {
    let mut tally = Tally::default();
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
