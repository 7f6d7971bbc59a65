//! Programs that fork with their heap on extents: every child sees the heap as of its fork, and nothing is left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::{Tally, recall};
use crate::broker::{self, Broker};
use crate::packages;
use crate::process::{self, Background};

/// Long, because machines are slow and the program watches itself.
const LIMIT: Duration = Duration::from_secs(240);
const PROGRAM: &str = include_str!("fork.c");
const LAZY: &[&str] = &["--conf", "fork:lazy"];
const MIB: u64 = 1 << 20;

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["gcc", "libc6-dev"])?;
    let mut tally = Tally::default();
    if !recall::live_memory_moves()? {
        tally.skip("fork", "no userfaultfd here, so that no heap can be shared");
        return Ok(tally);
    }
    let dir = tempfile::tempdir()?;
    let (source, program) = (dir.path().join("fork.c"), dir.path().join("fork"));
    fs::write(&source, PROGRAM)?;
    let mut compile = Command::new("cc");
    compile.args(["-O1", "-Wall", "-Werror", "-o"]);
    compile.arg(&program).arg(&source).arg("-lpthread");
    ensure!(process::run_visibly(&mut compile)?, "cc failed");

    for policy in ["lazy", "eager"] {
        let what = format!("children and grandchildren, fork:{policy}");
        tally.check(&what, storm(&program, policy, "20"));
    }
    tally.check("children killed while they read", killed(&program));
    tally.check("the parent ends first", orphan(&program));
    tally.check("originals recalled from all holders", recalled(&program));
    tally.check("the broker dies before a touch", broker_dies(&program));
    tally.check("what was spilled before", spilled(&program, dir.path()));
    Ok(tally)
}

/// The command's long form is `DCM_FORKS=1000 cargo xtask test fork`.
fn forks(short: &str) -> String {
    std::env::var("DCM_FORKS").unwrap_or_else(|_| short.into())
}

/// Forks while four threads allocate, and all capacity is recalled every 200 ms.
fn storm(program: &Path, policy: &str, short: &str) -> Result<()> {
    let broker = Broker::serve("512M")?;
    let conf = format!("fork:{policy}");
    let mut run = broker.run_with(&["--conf", &conf], program);
    let mut storm = Background::start(run.args(["64", &forks(short), "4"]))?;
    storm.wait_for("ready", LIMIT)?;
    let (mut recalls, mut returned, mut forked) = (0, 0, 0);
    while !storm.has_ended()? {
        thread::sleep(Duration::from_millis(200));
        let receipt = broker.order_json(&["release", "512M", "--deadline", "10000"])?;
        recalls += 1;
        for step in ["to_extents", "to_dram"] {
            returned += broker::number(&receipt, &format!("/returned_{step}"))?;
        }
        let back = broker::number(&receipt, "/returned")?;
        if back > 0 {
            broker.order(&["add", &back.to_string()])?;
        }
        forked = broker.status_number("/counters/forked_bytes")?;
    }
    intact(storm)?;
    eprintln!(
        "  fork:{policy}: {recalls} recalls, {} MiB moved while in use, {} MiB shared",
        returned / MIB,
        forked / MIB
    );
    ensure!(returned > 0, "nothing was moved by {recalls} recalls");
    ensure!(
        (forked > 0) == (policy == "lazy"),
        "{forked} bytes were shared"
    );
    nothing_stays(&broker)
}

fn killed(program: &Path) -> Result<()> {
    let broker = Broker::serve("256M")?;
    let mut run = broker.run_with(LAZY, program);
    intact(Background::start(run.args(["64", "15", "0", "kill"]))?)?;
    nothing_stays(&broker)
}

fn orphan(program: &Path) -> Result<()> {
    let broker = Broker::serve("256M")?;
    let dir = tempfile::tempdir()?;
    let well = dir.path().join("well");
    let mut run = broker.run_with(LAZY, program);
    let parent = Background::start(run.args(["64", "1", "0", "orphan"]).arg(&well))?;
    ensure!(parent.finish(LIMIT)?.success(), "the parent failed");
    let end = Instant::now() + LIMIT;
    while !well.exists() {
        ensure!(Instant::now() < end, "the child saw another heap, or hangs");
        thread::sleep(Duration::from_millis(20));
    }
    nothing_stays(&broker)
}

/// A parent and a child that hold the same 64 MiB and have not looked at them since the fork.
struct Held {
    broker: Broker,
    program: Background,
    go: PathBuf,
    _dir: tempfile::TempDir,
}

impl Held {
    fn start(program: &Path, options: &[&str]) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let go = dir.path().join("go");
        let broker = Broker::serve("256M")?;
        let mut run = broker.run_with(options, program);
        let program = Background::start(run.args(["64", "1", "0", "hold"]).arg(&go))?;
        Ok(Self {
            broker,
            program,
            go,
            _dir: dir,
        })
    }

    /// Waits until as many bytes are shared.
    fn shared(mut self, bytes: u64) -> Result<Self> {
        self.program.wait_for("ready", LIMIT)?;
        let end = Instant::now() + LIMIT;
        while self.broker.status_number("/counters/forked_bytes")? < bytes {
            ensure!(Instant::now() < end, "nothing was shared");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(self)
    }

    /// Has both look.
    fn finish(self) -> Result<()> {
        fs::write(&self.go, b"go")?;
        intact(self.program)?;
        nothing_stays(&self.broker)
    }
}

fn recalled(program: &Path) -> Result<()> {
    let held = Held::start(program, LAZY)?.shared(64 * MIB)?;
    let order = ["release", "256M", "--deadline", "60000"];
    let receipt = held.broker.order_json(&order)?;
    let number = |pointer| broker::number(&receipt, pointer);
    ensure!(
        number("/returned")? == 256 * MIB && number("/returned_to_dram")? >= 64 * MIB,
        "not all came back: {receipt}"
    );
    held.finish()
}

fn broker_dies(program: &Path) -> Result<()> {
    let held = Held::start(program, LAZY)?.shared(64 * MIB)?;
    let worker = worker(&held.broker)?;
    kill_process(worker, Signal::KILL)?;
    let end = Instant::now() + LIMIT;
    while held.broker.status_number("/counters/clients_adopted").ok() != Some(1) {
        ensure!(Instant::now() < end, "no broker came after");
        thread::sleep(Duration::from_millis(50));
    }
    // The one that came after knows whose the originals are.
    let leased = held.broker.status_number("/capacity/leased")?;
    ensure!(leased >= 64 * MIB, "only {leased} bytes are leased");
    let order = ["release", "128M", "--deadline", "60000"];
    held.broker.order(&order)?;
    held.finish()
}

/// The process that serves for a keeper.
fn worker(broker: &Broker) -> Result<Pid> {
    let keeper = broker.id();
    let children = fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children"))?;
    let first = children.split_whitespace().next();
    let pid: i32 = first.context("the keeper has no worker")?.parse()?;
    Pid::from_raw(pid).context("no process")
}

/// A recall puts the heap into a file before the fork.
fn spilled(program: &Path, dir: &Path) -> Result<()> {
    let broker = Broker::serve("256M")?;
    let conf = format!("fork:lazy,dram_limit:0,spill_dir:{}", dir.display());
    let mut run = broker.run_with(&["--conf", &conf], program);
    let go = dir.join("go");
    let mut program = Background::start(run.args(["64", "3", "0", "later"]).arg(&go))?;
    program.wait_for("ready", LIMIT)?;
    let receipt = broker.order_json(&["release", "256M", "--deadline", "60000"])?;
    let spilled = broker::number(&receipt, "/returned_spilled")?;
    ensure!(spilled >= 32 * MIB, "not much was spilled: {receipt}");
    // A part of it comes back to extents and is shared.
    broker.order(&["add", "32M"])?;
    fs::write(&go, b"")?;
    intact(program)?;
    nothing_stays(&broker)
}

fn intact(program: Background) -> Result<()> {
    let finished = program.finish(LIMIT)?;
    ensure!(
        finished.success() && finished.stdout.ends_with("intact\n"),
        "the program: {} {} {}",
        finished.ending(),
        finished.stdout.trim(),
        finished.stderr.trim()
    );
    Ok(())
}

/// No lease, no client, and no descriptor of either.
fn nothing_stays(broker: &Broker) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let status = broker.order_json(&["status"])?;
        let leased = broker::number(&status, "/capacity/leased")?;
        let clients = status.pointer("/clients").and_then(|c| c.as_array());
        let living = clients.map_or(0, |all| all.iter().filter(|c| c["ended"] == false).count());
        let fds = fs::read_dir(format!("/proc/{}/fd", worker(broker)?.as_raw_nonzero()))?.count();
        if leased == 0 && living == 0 && fds < 32 {
            return Ok(());
        }
        ensure!(
            Instant::now() < end,
            "{leased} bytes are leased, {living} clients live, the broker has {fds} descriptors"
        );
        thread::sleep(Duration::from_millis(50));
    }
}
