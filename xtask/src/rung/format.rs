//! rustfmt.

use anyhow::Result;

use super::Tally;
use crate::{process, workspace};

pub(super) fn run() -> Result<Tally> {
    let mut tally = Tally::default();
    if process::run_visibly(workspace::cargo().args(["fmt", "--all", "--check"]))? {
        tally.pass();
    } else {
        tally.fail("format", "rustfmt would change files; run cargo fmt");
    }
    Ok(tally)
}
