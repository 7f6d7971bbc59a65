//! Capacity on its way in and out: an offer is usable memory at once, and what a program frees becomes free
//! capacity although the program does nothing more.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::Tally;
use crate::broker::{self, Broker};
use crate::process::{self, Background};
use crate::{packages, workspace};

/// How soon freed capacity must be back.
const PATIENCE: Duration = Duration::from_secs(2);
/// The share of what was held that must be back by then.
const LEAST_RETURNED: f64 = 0.80;
/// Median of the time from an offer to usable memory.
const OFFER_LIMIT_US: u64 = 5000;

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["gcc", "libc6-dev"])?;
    let mut tally = Tally::default();
    tally.check("offer of three extents", offers_are_usable_at_once());
    let program = build()?;
    tally.check(
        "all but the last tenth freed",
        freed_comes_back(&program, "prefix", LEAST_RETURNED),
    );
    // Objects of 1 KiB: hardly a granule is without a survivor, so that only moving them returns capacity.
    tally.check(
        "a random nine tenths freed",
        freed_comes_back(&program, "random", f64::NEG_INFINITY),
    );
    Ok(tally)
}

fn offers_are_usable_at_once() -> Result<()> {
    let broker = Broker::serve("64M")?;
    let mut times = Vec::new();
    for _ in 0..15 {
        let added = broker.order_json(&["add", "64M,32M,32M"])?;
        let accepted = added["accepted"].as_array().map_or(0, Vec::len);
        ensure!(accepted == 3, "{accepted} of 3 extents were accepted");
        times.push(broker::number(&added, "/duration_us")?);
        broker.order(&["release", "128M"])?;
    }
    times.sort_unstable();
    let median = times[times.len() / 2];
    eprintln!(
        "  offer of 3 extents to usable memory: median {median} us, slowest {} us",
        times[times.len() - 1]
    );
    ensure!(
        median <= OFFER_LIMIT_US,
        "the median is {median} us, more than {OFFER_LIMIT_US}"
    );
    Ok(())
}

/// Compiles the program with the two patterns.
pub(super) fn build() -> Result<PathBuf> {
    let program = workspace::target().join("free_patterns");
    let mut compile = Command::new("cc");
    compile
        .args(["-O2", "-Wall", "-Wextra", "-Werror"])
        .arg(workspace::root().join("benches/programs/free_patterns.c"))
        .arg("-o")
        .arg(&program);
    ensure!(
        process::run_visibly(&mut compile)?,
        "cc failed on free_patterns.c"
    );
    Ok(program)
}

/// Watches from outside what the program holds, from the moment it has freed.
fn freed_comes_back(program: &Path, pattern: &str, least: f64) -> Result<()> {
    let broker = Broker::serve("1G")?;
    let mut program = Background::start(broker.run(program).args([pattern, "3"]))?;
    program.wait_for("phase filled", Duration::from_secs(60))?;
    let held = broker.status_number("/capacity/leased")?;
    ensure!(held >= 512 << 20, "only {held} bytes were on extents");
    program.wait_for("phase freed", Duration::from_secs(60))?;

    let start = Instant::now();
    let mut returned = 0.0;
    let mut reached = None;
    while start.elapsed() < PATIENCE {
        let leased = broker.status_number("/capacity/leased")?;
        // The program may still be growing its reserve.
        returned = (1.0 - leased as f64 / held as f64).max(0.0);
        if reached.is_none() && returned >= LEAST_RETURNED {
            reached = Some(start.elapsed());
        }
        thread::sleep(Duration::from_millis(50));
    }
    let when = reached.map_or_else(String::new, |at| {
        format!(
            ", {:.0} % of it after {:.2} s",
            LEAST_RETURNED * 100.0,
            at.as_secs_f64()
        )
    });
    eprintln!(
        "  {pattern}: {:.1} % of {} MiB came back within {} s{when}",
        returned * 100.0,
        held >> 20,
        PATIENCE.as_secs()
    );
    let finished = program.finish(Duration::from_secs(30))?;
    ensure!(
        finished.success(),
        "the program: {} {}",
        finished.ending(),
        finished.stderr.trim()
    );
    ensure!(
        returned >= least,
        "only {:.1} % came back within {} s",
        returned * 100.0,
        PATIENCE.as_secs()
    );
    Ok(())
}
