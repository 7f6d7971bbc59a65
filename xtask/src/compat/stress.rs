//! stress-ng's malloc and fork stressors, which verify what they read.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::session::explain;
use super::{Program, Results, Scale, Session};
use crate::{packages, process};

const LIMIT: Duration = Duration::from_secs(300);

pub(super) const PROGRAM: Program = Program {
    name: "stress-ng",
    how: "--malloc 2 --fork 2 --verify for 60 s, at most 16,384 blocks in each worker; with `io_dram:false`, \
          because many of its blocks are aligned as for direct I/O",
    short: true,
    prepare: || packages::ensure(&["stress-ng"]),
    version: || packages::version("stress-ng"),
    run,
};

fn run(session: &Session) -> Result<Results> {
    let seconds = if session.scale == Scale::Short {
        "8"
    } else {
        "60"
    };
    let mut stress = session.command("stress-ng");
    stress.args([
        "--malloc",
        "2",
        "--malloc-max",
        "16384",
        "--fork",
        "2",
        "--verify",
    ]);
    stress.args(["--timeout", seconds, "--temp-path", "."]);
    stress.env("DCMALLOC_CONF", "io_dram:false");
    let finished = process::run(&mut stress, LIMIT)?;
    ensure!(finished.success(), "{}", explain(&stress, &finished));
    let mut results = Results::default();
    // What was read wrong is a line with `fail:`, and no success at the end.
    let told = format!("{}{}", finished.stdout, finished.stderr);
    for what in ["successful run completed", "fail:"] {
        results.add(what, told.contains(what).to_string());
    }
    Ok(results)
}
