//! `cargo xtask test`: the rungs of the ladder, each with its verdict, and one line that sums them up.

use std::time::Instant;

use anyhow::{Result, bail};

use crate::rung::{self, Rung, Tally};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Rungs to run; all when none is named
    rungs: Vec<String>,
    /// List the rungs and what they show
    #[arg(long)]
    list: bool,
}

/// Whether nothing failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.list {
        for rung in rung::ALL {
            println!("{:<14} {}", rung.name, rung.shows);
        }
        return Ok(true);
    }
    let mut results = Vec::new();
    for rung in chosen(&options.rungs)? {
        eprintln!("--- {}", rung.name);
        let start = Instant::now();
        // A rung that can't even run has failed; the others still have their say.
        let tally = (rung.run)().unwrap_or_else(|error| {
            let mut tally = Tally::default();
            tally.fail(rung.name, format!("{error:#}"));
            tally
        });
        results.push((rung.name, tally, start.elapsed().as_secs_f64()));
    }
    Ok(report(&results))
}

fn chosen(names: &[String]) -> Result<Vec<&'static Rung>> {
    if names.is_empty() {
        return Ok(rung::ALL.iter().collect());
    }
    for name in names {
        if !rung::ALL.iter().any(|rung| rung.name == name) {
            let known: Vec<_> = rung::ALL.iter().map(|rung| rung.name).collect();
            bail!("no rung {name}; there are {}", known.join(", "));
        }
    }
    // In the order of the ladder: later rungs use what earlier ones build.
    Ok(rung::ALL
        .iter()
        .filter(|rung| names.iter().any(|name| name == rung.name))
        .collect())
}

fn report(results: &[(&str, Tally, f64)]) -> bool {
    let mut total = Tally::default();
    for (_, tally, _) in results {
        total.add(tally);
    }
    println!();
    for (what, reason) in &total.skipped {
        println!("SKIPPED {what}: {reason}");
    }
    for (what, reason) in &total.failed {
        println!("FAILED {what}: {reason}");
    }
    println!(
        "\n{:<14} {:<7} {:>7} {:>7} {:>8} {:>9}",
        "rung", "result", "passed", "failed", "skipped", "seconds"
    );
    for (name, tally, seconds) in results {
        println!(
            "{name:<14} {:<7} {:>7} {:>7} {:>8} {seconds:>9.1}",
            tally.verdict(),
            tally.passed,
            tally.failed.len(),
            tally.skipped.len()
        );
    }
    println!(
        "\n{} passed, {} failed, {} skipped",
        total.passed,
        total.failed.len(),
        total.skipped.len()
    );
    total.failed.is_empty()
}
