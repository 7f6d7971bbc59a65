//! rustfmt.

use anyhow::Result;

use super::Tally;
use crate::{process, workspace};

pub(super) fn run() -> Result<Tally> {
    let mut tally = Tally::default();
    let check = |also: &[&str]| {
        let mut fmt = workspace::cargo();
        process::run_visibly(fmt.args(["fmt", "--all", "--check"]).args(also))
    };
    // A workspace of its own.
    let fuzz = check(&["--manifest-path", "fuzz/Cargo.toml"])?;
    if check(&[])? && fuzz {
        tally.pass();
    } else {
        tally.fail("format", "rustfmt would change files; run cargo fmt");
    }
    Ok(tally)
}
