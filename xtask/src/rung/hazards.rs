//! What programs do to their memory, their descriptors and their limits while all their extents are recalled:
//! nothing is lost, and what stays is named.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Tally, recall};
use crate::broker::{self, Broker};
use crate::packages;
use crate::process::{self, Background};

const LIMIT: Duration = Duration::from_secs(60);
/// The program goes on for longer than this.
const PATIENCE: Duration = Duration::from_secs(2);
const PROGRAM: &str = include_str!("hazards.c");
const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";
/// What the program has on its heap.
const LIVE: u64 = 64 << 20;

/// What a recall of everything is to bring.
enum Wanted {
    /// All of it.
    Everything,
    /// All but one granule, for this reason.
    AllBut(&'static str),
    /// Nothing of what is live, for this reason.
    Nothing(&'static str),
    /// Anything from nothing to everything, but for these reasons.
    Some(&'static [&'static str]),
    /// All of it into a file, and the process says this of itself.
    Spilled(u64),
}

/// A client's `degraded_flags`: io_uring is denied.
const NO_RING: u64 = 1 << 6;

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["gcc", "libc6-dev"])?;
    let mut tally = Tally::default();
    if !recall::live_memory_moves()? {
        tally.skip(
            "hazards",
            "no userfaultfd here, so that live memory cannot be moved",
        );
        return Ok(tally);
    }
    let dir = tempfile::tempdir()?;
    let (source, program) = (dir.path().join("hazards.c"), dir.path().join("hazards"));
    fs::write(&source, PROGRAM)?;
    let mut compile = Command::new("cc");
    compile
        .args(["-O1", "-Wall", "-Werror", "-o"])
        .arg(&program)
        .arg(&source);
    ensure!(process::run_visibly(&mut compile)?, "cc failed");

    let starved: &[&str] = &["dram-limit", "cannot-move", "mappings"];
    for (what, how, wanted) in [
        ("nothing in particular", "", Wanted::Everything),
        ("mlockall(MCL_FUTURE)", "mlockall", Wanted::Everything),
        ("all descriptors closed", "close", Wanted::Everything),
        (
            "mprotect on a heap page",
            "mprotect",
            Wanted::AllBut("remapped"),
        ),
        ("mlock on a heap page", "mlock", Wanted::AllBut("remapped")),
        ("little address space", "addresses", Wanted::Some(starved)),
        ("few mappings left", "mappings", Wanted::Some(&["mappings"])),
        (
            "the last mappings",
            "no mappings",
            Wanted::Nothing("mappings"),
        ),
        (
            "userfaultfd denied",
            "userfaultfd",
            Wanted::Some(&["cannot-move"]),
        ),
        ("io_uring denied", "io_uring", Wanted::Spilled(NO_RING)),
        ("io_uring", "", Wanted::Spilled(0)),
    ] {
        tally.check(what, survives(&program, dir.path(), how, &wanted));
    }
    match Overcommit::strict() {
        Some(_strict) => tally.check(
            "overcommit_memory=2",
            survives(&program, dir.path(), "", &Wanted::Some(starved)),
        ),
        None => tally.skip(
            "overcommit_memory=2",
            format!("{OVERCOMMIT} cannot be written"),
        ),
    }
    Ok(tally)
}

fn survives(program: &Path, dir: &Path, how: &str, wanted: &Wanted) -> Result<()> {
    let broker = Broker::serve("256M")?;
    let conf = format!("dram_limit:0,spill_dir:{}", dir.display());
    let options: &[&str] = match wanted {
        Wanted::Spilled(_) => &["--conf", &conf],
        _ => &[],
    };
    let mut program = Background::start(broker.run_with(options, program).arg(how))?;
    program.wait_for("ready", LIMIT)?;
    // The process says so now and then only.
    let end = Instant::now() + PATIENCE;
    while broker.status_number("/clients/0/stats/extent_live_bytes")? < LIVE {
        ensure!(Instant::now() < end, "the heap is not on extents");
        thread::sleep(Duration::from_millis(5));
    }
    let flags = broker.status_number("/clients/0/stats/degraded_flags")?;
    let accepted = broker.status_number("/capacity/accepted")?;
    let receipt = broker.order_json(&["release", &accepted.to_string(), "--deadline", "10000"])?;
    let finished = program.finish(LIMIT)?;
    ensure!(
        finished.success() && finished.stdout.ends_with("intact\n"),
        "the program: {} {} {}; {receipt}",
        finished.ending(),
        finished.stdout.trim(),
        finished.stderr.trim()
    );
    let number = |pointer| broker::number(&receipt, pointer);
    let (returned, reasons) = (number("/returned")?, reasons(&receipt)?);
    match *wanted {
        Wanted::Everything => ensure!(returned == accepted, "not in full: {receipt}"),
        Wanted::AllBut(reason) => ensure!(
            accepted - returned == 2 << 20 && reasons == [reason],
            "{reasons:?}: {receipt}"
        ),
        Wanted::Nothing(reason) => ensure!(
            accepted - returned >= LIVE && reasons == [reason],
            "{reasons:?}: {receipt}"
        ),
        Wanted::Some(known) => {
            let unknown = reasons
                .iter()
                .find(|reason| !known.contains(&reason.as_str()));
            ensure!(unknown.is_none(), "{unknown:?}: {receipt}");
            ensure!(returned == accepted || !reasons.is_empty(), "{receipt}");
        }
        Wanted::Spilled(flag) => {
            ensure!(returned == accepted, "not in full: {receipt}");
            let spilled = number("/returned_spilled")?;
            ensure!(spilled >= LIVE, "{spilled} bytes spilled: {receipt}");
            ensure!(flags & NO_RING == flag, "degraded_flags {flags:#x}");
        }
    }
    eprintln!(
        "  {how:12} {:4} of {} MiB back {reasons:?}",
        returned >> 20,
        accepted >> 20
    );
    Ok(())
}

fn reasons(receipt: &Value) -> Result<Vec<String>> {
    let refused = receipt["refused"].as_array().context("no refusals")?;
    let mut reasons: Vec<String> = refused
        .iter()
        .filter_map(|refusal| refusal["reason"].as_str().map(str::to_owned))
        .collect();
    reasons.sort();
    reasons.dedup();
    Ok(reasons)
}

/// The kernel commits no more than it has, until this is dropped.
struct Overcommit {
    before: String,
}

impl Overcommit {
    fn strict() -> Option<Self> {
        let before = fs::read_to_string(OVERCOMMIT).ok()?;
        fs::write(OVERCOMMIT, "2").ok()?;
        Some(Self { before })
    }
}

impl Drop for Overcommit {
    fn drop(&mut self) {
        if let Err(error) = fs::write(OVERCOMMIT, &self.before) {
            eprintln!(
                "{OVERCOMMIT} is still 2, was {}: {error}",
                self.before.trim()
            );
        }
    }
}
