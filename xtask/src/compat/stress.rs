//! stress-ng's malloc and fork stressors, which verify what they read.

use std::time::Duration;

use anyhow::Result;

use super::{Program, Results, Scale, Session};
use crate::packages;

pub(super) const PROGRAM: Program = Program {
    name: "stress-ng",
    how: "--malloc 2 --fork 2 --verify for 60 s, at most 16,384 blocks in each worker",
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
    let output = session.succeed(&mut stress, Duration::from_secs(300))?;
    let mut results = Results::default();
    // `stress-ng: info:  [77] passed: 4: malloc (2) fork (2)`
    for line in output.lines() {
        let Some((_, said)) = line.split_once("] ") else {
            continue;
        };
        if let Some((what, how)) = said.split_once(": ")
            && ["skipped", "passed", "failed", "metrics-check"].contains(&what.trim())
        {
            results.add(what.trim(), how);
        }
    }
    Ok(results)
}
