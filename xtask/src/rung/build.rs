//! The release build of what the later rungs run.

use anyhow::Result;

use super::Tally;
use crate::{process, workspace};

pub(super) fn run() -> Result<Tally> {
    let mut tally = Tally::default();
    if release()? {
        tally.pass();
    } else {
        tally.fail("build", "cargo build --release failed; see above");
    }
    Ok(tally)
}

/// Builds `dcm`, the libraries, the comparison and the example for release.
pub(crate) fn release() -> Result<bool> {
    let mut build = workspace::cargo();
    build.args(["build", "--quiet", "--release"]);
    for package in [
        "dcm",
        "dcmalloc-preload",
        "dcmalloc-c",
        "dcmalloc-benches",
        "dcmalloc-examples",
    ] {
        build.args(["--package", package]);
    }
    process::run_visibly(&mut build)
}
