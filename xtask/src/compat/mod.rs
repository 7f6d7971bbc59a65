//! `cargo xtask compat`: programs and their own test suites, without us, with their heaps on extents, and again
//! while extents are taken back and given again all the time. The result is the table of
//! `docs/compatibility.md`.

mod daemon;
mod gcc;
mod junit;
mod memcached;
mod page;
mod postgres;
mod python;
mod recalls;
mod redis;
mod results;
mod rocksdb;
mod row;
mod session;
mod snapshot;
mod sqlite;
mod stress;
mod valkey;

use std::time::Instant;

use anyhow::{Result, bail};

use crate::rung::{self, Tally};
pub(crate) use results::Results;
use row::Row;
pub(crate) use session::Session;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Programs to judge; all when none is named
    names: Vec<String>,
    /// List the programs and how each is judged
    #[arg(long)]
    list: bool,
    /// The short form of each, which the rung `compat` runs; the page stays as it is
    #[arg(long)]
    short: bool,
}

/// How much of a suite is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// What fits into the test ladder.
    Short,
    /// All of it.
    Whole,
}

/// One program, and how it is judged.
#[derive(Debug)]
pub(crate) struct Program {
    pub(crate) name: &'static str,
    /// How it was tested, for the page.
    pub(crate) how: &'static str,
    /// Whether there is a short form of it.
    pub(crate) short: bool,
    /// Installs and builds what is needed.
    pub(crate) prepare: fn() -> Result<()>,
    /// The version that is judged, and whose it is.
    pub(crate) version: fn() -> Result<String>,
    /// Runs it once, and says what came of each part.
    pub(crate) run: fn(&Session) -> Result<Results>,
}

/// All of them, quick ones first.
const ALL: &[Program] = &[
    sqlite::PROGRAM,
    daemon::PROGRAM,
    gcc::PROGRAM,
    stress::PROGRAM,
    python::PROGRAM,
    rocksdb::PROGRAM,
    valkey::PROGRAM,
    memcached::PROGRAM,
    postgres::PROGRAM,
    redis::PROGRAM,
];

/// Whether every program did the same as without us.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.list {
        for program in ALL {
            println!("{:<12} {}", program.name, program.how);
        }
        return Ok(true);
    }
    let programs = chosen(&options.names)?;
    if !rung::build::release()? {
        bail!("the release build failed");
    }
    let scale = if options.short {
        Scale::Short
    } else {
        Scale::Whole
    };
    let mut well = true;
    for program in programs {
        match judge(program, scale) {
            Ok(row) => {
                well &= row.failures.is_empty();
                if scale == Scale::Whole {
                    page::write(&row)?;
                }
            }
            // The others still have their say.
            Err(error) => {
                well = false;
                eprintln!("error: {error:#}");
            }
        }
    }
    Ok(well)
}

/// The short forms, as a rung.
pub(crate) fn rung() -> Result<Tally> {
    let mut tally = Tally::default();
    for program in ALL.iter().filter(|program| program.short) {
        match judge(program, Scale::Short) {
            Ok(row) if row.failures.is_empty() => tally.pass(),
            Ok(row) => tally.fail(program.name, row.failures.join("; ")),
            Err(error) => tally.fail(program.name, format!("{error:#}")),
        }
    }
    Ok(tally)
}

fn chosen(names: &[String]) -> Result<Vec<&'static Program>> {
    if let Some(name) = names
        .iter()
        .find(|name| !ALL.iter().any(|program| program.name == **name))
    {
        let known: Vec<_> = ALL.iter().map(|program| program.name).collect();
        bail!("no program {name}; there are {}", known.join(", "));
    }
    Ok(ALL
        .iter()
        .filter(|program| names.is_empty() || names.iter().any(|name| name == program.name))
        .collect())
}

/// Runs `program` in all three ways.
fn judge(program: &'static Program, scale: Scale) -> Result<Row> {
    let start = Instant::now();
    eprintln!("{}", program.name);
    (program.prepare)()?;
    let mut row = Row::new(program, (program.version)()?);
    row.judge(scale)?;
    eprintln!("  {:.0} s in all", start.elapsed().as_secs_f64());
    for failure in &row.failures {
        eprintln!("  FAILED {failure}");
    }
    Ok(row)
}
