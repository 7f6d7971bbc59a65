//! `cargo xtask soak`: storms at their full length, and measurements that want the machine to themselves; the ladder
//! runs them in short, or not at all. The result is the table of `docs/soak.md`.

mod forks;
mod harness;
mod page;

use std::time::Instant;

use anyhow::{Result, bail};

use crate::others::Others;
use harness::TestFile;
use page::Report;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Parts to run; all when none is named
    names: Vec<String>,
    /// List the parts and what each does
    #[arg(long)]
    list: bool,
}

/// One long task.
#[derive(Debug)]
struct Part {
    name: &'static str,
    /// What it does, for the page.
    what: &'static str,
    run: Run,
}

#[derive(Debug)]
enum Run {
    Test(TestFile),
    /// Tells what it saw in the notes.
    Task(fn(&mut Vec<String>) -> Result<()>),
}

/// How long a storm blows.
const SECONDS: u64 = 60;

/// All of them, short ones first.
const ALL: &[Part] = &[
    Part {
        name: "bandwidth",
        what: "granules moved between extents and DRAM against memcpy of as much, and what a busy thread waits for \
               them, with nothing else running (`rebind_bandwidth`)",
        run: Run::Test(TestFile {
            name: "rebind_bandwidth",
            profile: "release",
            ignored: true,
            length: None,
        }),
    },
    Part {
        name: "rebind-storm",
        what: "60 s: counters, system calls and datagrams while granules move; then 20 s without the placeholder, \
               which must lose some (`rebind_storm`)",
        run: Run::Test(TestFile {
            name: "rebind_storm",
            profile: "test",
            ignored: false,
            length: Some(("REBIND_STORM_SECONDS", SECONDS)),
        }),
    },
    Part {
        name: "heap-storm",
        what: "60 s: a heap of 256 MiB in use by four threads, at least a quarter of it recalled each time and given \
               back (`heap_storm`)",
        run: Run::Test(TestFile {
            name: "heap_storm",
            profile: "test",
            ignored: false,
            length: Some(("DCM_STORM_SECONDS", SECONDS)),
        }),
    },
    Part {
        name: "fork-cost",
        what: "fork(2) of 1 GiB on extents in turns with 1 GiB of ordinary memory in 4 KiB pages, and how it grows",
        run: Run::Task(forks::cost),
    },
    Part {
        name: "fork-storm-eager",
        what: "1,000 forks while four threads allocate and everything is recalled every 200 ms, children that fork \
               again, `fork:eager`; nothing may stay",
        run: Run::Task(forks::eager),
    },
    Part {
        name: "fork-storm-lazy",
        what: "the same with `fork:lazy`",
        run: Run::Task(forks::lazy),
    },
];

/// Whether every part held.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.list {
        for part in ALL {
            println!("{:<18} {}", part.name, part.what);
        }
        return Ok(true);
    }
    let parts = chosen(&options.names)?;
    let revision = crate::page::revision()?;
    let mut well = true;
    for part in parts {
        well &= part.run(&revision)?;
    }
    Ok(well)
}

impl Part {
    /// Whether it held. The page has it in either case.
    fn run(&self, revision: &str) -> Result<bool> {
        eprintln!("{}: {}", self.name, self.what);
        let (start, others) = (Instant::now(), Others::watch()?);
        let mut notes = Vec::new();
        let result = match &self.run {
            Run::Test(test) => test.run(&mut notes),
            Run::Task(task) => task(&mut notes),
        };
        let report = Report {
            notes,
            failed: result.err().map(|error| format!("{error:#}")),
            seconds: start.elapsed().as_secs_f64(),
            others: others.share()?,
        };
        for note in &report.notes {
            eprintln!("  {note}");
        }
        match &report.failed {
            None => eprintln!("  ok, {:.0} s", report.seconds),
            Some(reason) => eprintln!("  FAILED {reason}"),
        }
        page::write(self, &report, revision)?;
        Ok(report.failed.is_none())
    }
}

fn chosen(names: &[String]) -> Result<Vec<&'static Part>> {
    if let Some(name) = names
        .iter()
        .find(|name| !ALL.iter().any(|part| part.name == **name))
    {
        let known: Vec<_> = ALL.iter().map(|part| part.name).collect();
        bail!("no part {name}; there are {}", known.join(", "));
    }
    Ok(ALL
        .iter()
        .filter(|part| names.is_empty() || names.iter().any(|name| name == part.name))
        .collect())
}
