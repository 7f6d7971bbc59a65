//! Runs the workload programs under dcmalloc and under another allocator, interleaved, and compares.
//!
//! Exit code: 0 within the limits, 1 over one of them, 2 usage.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use dcmalloc_benches::contender::{Contender, Sample};
use dcmalloc_benches::programs::{self, WORKLOADS, Workload};
use dcmalloc_benches::report::{self, Comparison, Row};

#[derive(Debug, Parser)]
#[command(about = "Compare dcmalloc with another allocator on the programs of benches/programs")]
struct Options {
    /// Interleaved rounds of each program
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Only these programs
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Placements of ours to compare
    #[arg(long, value_delimiter = ',', default_value = "dc,size:64K")]
    placement: Vec<String>,
    /// Size of the software device
    #[arg(long, default_value = "1G")]
    emulate: String,
    /// The `dcm` binary; its library lies beside it
    #[arg(long, default_value = "target/release/dcm")]
    dcm: PathBuf,
    /// The library to compare with
    #[arg(long, default_value = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2")]
    against: PathBuf,
    /// Short runs of each program, as the test run does them
    #[arg(long)]
    short: bool,
    /// Factor on every limit: a short run on a busy machine is no judge of five percent
    #[arg(long, default_value_t = 1.0)]
    slack: f64,
    /// Append rows of NDJSON to this file
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    match compare(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("compare: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn compare(options: &Options) -> Result<bool> {
    ensure!(options.rounds > 0, "--rounds must be at least 1");
    ensure!(
        options.against.is_file(),
        "{} is not there; Debian has jemalloc's in libjemalloc2",
        options.against.display()
    );
    let dcm = options
        .dcm
        .canonicalize()
        .with_context(|| format!("no {}; build with --release first", options.dcm.display()))?;
    let ours = options
        .placement
        .iter()
        .map(|placement| Contender::Dcmalloc {
            dcm: dcm.clone(),
            placement: placement.clone(),
            device_size: options.emulate.clone(),
        });
    let other = Contender::Preload {
        name: library_name(&options.against),
        library: options.against.clone(),
    };
    // The other one is last: every comparison is with it.
    let contenders: Vec<Contender> = ours.chain([other]).collect();
    let workloads: Vec<&Workload> = if options.only.is_empty() {
        WORKLOADS.iter().collect()
    } else {
        let named = options.only.iter().map(|name| Workload::named(name));
        named.collect::<Result<_>>()?
    };

    let programs_dir = tempfile::tempdir()?;
    let comparisons = measure(options, &workloads, &contenders, programs_dir.path())?;
    report::print_table(&comparisons, options.slack);
    Ok(comparisons
        .iter()
        .all(|comparison| comparison.holds(options.slack)))
}

fn measure(
    options: &Options,
    workloads: &[&Workload],
    contenders: &[Contender],
    programs_dir: &Path,
) -> Result<Vec<Comparison>> {
    let revision = report::git_revision();
    let names: Vec<String> = contenders.iter().map(ToString::to_string).collect();
    let mut comparisons = Vec::new();
    for workload in workloads {
        let program = programs::build(workload.name, programs_dir)?;
        let args = if options.short {
            workload.short
        } else {
            workload.full
        };
        let samples = interleaved(workload, &program, args, contenders, options.rounds)?;
        if let Some(out) = &options.out {
            for (name, samples) in names.iter().zip(&samples) {
                Row::new(workload, args, name, &revision, samples).append_to(out)?;
            }
        }
        let other = contenders.len() - 1;
        for ours in 0..other {
            comparisons.push(Comparison::of(
                workload,
                (&names[ours], &samples[ours]),
                (&names[other], &samples[other]),
            ));
        }
    }
    Ok(comparisons)
}

/// Samples per contender. Each round starts with another one, so that none always runs first.
fn interleaved(
    workload: &Workload,
    program: &Path,
    args: &[&str],
    contenders: &[Contender],
    rounds: usize,
) -> Result<Vec<Vec<Sample>>> {
    let mut samples = vec![Vec::with_capacity(rounds); contenders.len()];
    for round in 0..rounds {
        for turn in 0..contenders.len() {
            let which = (round + turn) % contenders.len();
            samples[which].push(contenders[which].run(workload, program, args)?);
        }
    }
    Ok(samples)
}

/// `libjemalloc.so.2` is called jemalloc.
fn library_name(library: &Path) -> String {
    let file = library.file_name().unwrap_or_default().to_string_lossy();
    let name = file.split('.').next().unwrap_or_default();
    name.strip_prefix("lib").unwrap_or(name).to_owned()
}
