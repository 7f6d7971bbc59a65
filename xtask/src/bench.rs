//! `cargo xtask bench`: the comparison with jemalloc, at full length.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::rung::build;
use crate::{packages, process, workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Passed on to `compare`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    compare: Vec<String>,
}

/// Whether every ratio was within its limit.
pub(crate) fn run(options: &Options) -> Result<bool> {
    packages::ensure(&["gcc", "libc6-dev", "libjemalloc2"])?;
    ensure!(build::release()?, "the release build failed");
    let mut compare = Command::new(workspace::release("compare"));
    compare.arg("--dcm").arg(workspace::dcm());
    compare
        .arg("--out")
        .arg(workspace::root().join("benches/results/compare.ndjson"));
    compare.args(&options.compare);
    process::run_visibly(&mut compare)
}
