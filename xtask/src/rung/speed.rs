//! A short comparison with jemalloc. Its limits are wide, because a short run on a busy machine is no
//! judge of five percent; `cargo xtask bench` is.

use anyhow::Result;

use super::Tally;
use crate::{packages, process, workspace};

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["gcc", "libc6-dev", "libjemalloc2"])?;
    let mut tally = Tally::default();
    let mut compare = std::process::Command::new(workspace::release("compare"));
    compare
        .current_dir(workspace::root())
        .arg("--dcm")
        .arg(workspace::dcm())
        .args(["--short", "--rounds", "3", "--slack", "2"]);
    if process::run_visibly(&mut compare)? {
        tally.pass();
    } else {
        tally.fail("speed", "over twice a limit; see the table above");
    }
    Ok(tally)
}
