//! Capacity taken by force from under a program: it reads zeroes if it has said so, and otherwise ends with SIGBUS and
//! one line, never with wrong data.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::Tally;
use crate::broker::Broker;
use crate::packages;
use crate::process::{self, Background, Finished};

const LIMIT: Duration = Duration::from_secs(60);
const PROGRAM: &str = include_str!("forced.c");
/// What the program has on its heap.
const LIVE: u64 = 64 << 20;

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["gcc", "libc6-dev"])?;
    let dir = tempfile::tempdir()?;
    let (source, program) = (dir.path().join("forced.c"), dir.path().join("forced"));
    fs::write(&source, PROGRAM)?;
    let mut compile = Command::new("cc");
    compile
        .args(["-O1", "-Wall", "-Werror", "-o"])
        .arg(&program)
        .arg(&source);
    ensure!(process::run_visibly(&mut compile)?, "cc failed");
    let mut tally = Tally::default();
    tally.check("a forced release with on_lost:zero", reads_zeroes(&program));
    tally.check("a forced release where nobody is told", faults(&program));
    Ok(tally)
}

/// Takes one of two extents from a program by force; what became of it.
fn take(program: &Path, options: &[&str]) -> Result<(Broker, Finished)> {
    let broker = Broker::serve("64M,64M")?;
    let mut program = Background::start(&mut broker.run_with(options, program))?;
    program.wait_for("ready", LIMIT)?;
    let end = Instant::now() + LIMIT;
    while broker.status_number("/clients/0/stats/extent_live_bytes")? < LIVE {
        ensure!(Instant::now() < end, "the heap is not on extents");
        thread::sleep(Duration::from_millis(5));
    }
    let status = broker.order_json(&["status"])?;
    let extent = |pointer| status.pointer(pointer).context("no extents");
    let dpa = extent("/extents/0/dpa")?.as_str().context("no address")?;
    let receipt = broker.order_json(&["release", &format!("{dpa}+32M"), "--force"])?;
    let lost = receipt["refused"].as_array().context("no refusals")?;
    ensure!(
        lost.iter().all(|refused| refused["reason"] == "lost") && !lost.is_empty(),
        "{receipt}"
    );
    Ok((broker, program.finish(LIMIT)?))
}

fn reads_zeroes(program: &Path) -> Result<()> {
    let (broker, finished) = take(program, &["--conf", "on_lost:zero"])?;
    ensure!(
        finished.success(),
        "{}: {} {}",
        finished.ending(),
        finished.stdout.trim(),
        finished.stderr.trim()
    );
    let said = finished.stdout.lines().last().unwrap_or_default();
    let numbers: Vec<u64> = said
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [zeroes, all] = numbers[..] else {
        anyhow::bail!("the program said: {said}");
    };
    ensure!(0 < zeroes && zeroes < all, "{said}");
    let lost = broker.status_number("/total/lost_granules")?;
    ensure!(lost > 0 && lost <= 16, "{lost} granules lost");
    // What it held is let go of, by the release and by its end.
    ensure!(
        broker.status_number("/capacity/leased")? == 0,
        "leased still"
    );
    eprintln!("  {said}, {lost} granules lost");
    Ok(())
}

fn faults(program: &Path) -> Result<()> {
    let (_broker, finished) = take(program, &[])?;
    // As a shell says it.
    ensure!(
        finished.status.code() == Some(128 + Signal::BUS.as_raw()),
        "{}: {}",
        finished.ending(),
        finished.stdout.trim()
    );
    let lines = finished.stderr.lines();
    let said = lines.filter(|line| line.contains("is lost: its device took it by force"));
    ensure!(said.count() == 1, "stderr: {}", finished.stderr.trim());
    Ok(())
}
