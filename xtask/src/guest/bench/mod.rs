//! `cargo xtask guest bench`: what the driver and the allocator cost on a CXL device of QEMU's, in counts and
//! ratios; docs/testing.md says what these numbers mean.

pub(super) mod measure;
mod plot;

use std::fs::OpenOptions;
use std::io::Write;
use std::process::Command;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use dcmalloc_benches::{programs, report};
use serde::{Deserialize, Serialize};

use super::test;
use crate::{packages, process, workspace};

/// C programs of `benches/programs` that run in the guest.
const PROGRAMS: &[&str] = &["copy", "kv"];

/// What was measured in one case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) bench: String,
    pub(super) case: String,
    pub(super) metric: String,
    pub(super) samples: Vec<f64>,
}

/// A line of `benches/results/guest.ndjson`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    row: &'a Row,
    git_revision: &'a str,
    unix_time: u64,
    /// Processors of the machine outside, which emulates the two inside.
    cpus: usize,
    qemu: &'a str,
}

/// Measures, appends the rows to `benches/results/guest.ndjson` and draws `guest.svg` there.
pub(super) fn run() -> Result<bool> {
    packages::ensure(&["gcc", "libc6-dev"])?;
    for name in PROGRAMS {
        programs::build(name, &measure::programs())?;
    }
    let names: Vec<String> = measure::ALL.iter().map(|c| c.name.to_owned()).collect();
    let report = test::in_guest(&names, false)?;
    let tally = test::tell(&report);
    let rows: Vec<&Row> = report.verdicts.iter().flat_map(|v| &v.rows).collect();
    for row in &rows {
        let median = report::median(row.samples.iter().copied());
        println!(
            "{:<10} {:<28} {:>10.4} {}",
            row.bench, row.case, median, row.metric
        );
    }
    if !tally.failed.is_empty() {
        return Ok(false);
    }
    let results = workspace::root().join("benches/results");
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(results.join("guest.ndjson"))?;
    let (revision, qemu) = (report::git_revision(), qemu_version()?);
    for row in &rows {
        let line = Line {
            row,
            git_revision: &revision,
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
            cpus: thread::available_parallelism()?.get(),
            qemu: &qemu,
        };
        writeln!(file, "{}", serde_json::to_string(&line)?)?;
    }
    plot::draw(&rows, &results.join("guest.svg"))?;
    Ok(true)
}

/// QEMU's version, as it says.
pub(super) fn qemu_version() -> Result<String> {
    let mut qemu = Command::new("qemu-system-x86_64");
    let said = process::run(qemu.arg("--version"), std::time::Duration::from_secs(60))?;
    ensure!(said.success(), "qemu-system-x86_64: {}", said.ending());
    let version = said.stdout.split_ascii_whitespace().nth(3);
    Ok(version.context("QEMU tells no version")?.to_owned())
}
