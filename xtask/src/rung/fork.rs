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
use crate::workspace;

/// Long, because machines are slow and the program watches itself.
const LIMIT: Duration = Duration::from_secs(240);
const PROGRAM: &str = include_str!("fork.c");
/// More than there is time for in the ladder; `cargo xtask soak` has it.
pub(crate) const FORKS: u32 = 1000;
const LAZY: &[&str] = &["--conf", "fork:lazy"];
const MIB: u64 = 1 << 20;

pub(super) fn run() -> Result<Tally> {
    let mut tally = Tally::default();
    if !recall::live_memory_moves()? {
        tally.skip("fork", "no userfaultfd here, so that no heap can be shared");
        return Ok(tally);
    }
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    let program = compile(dir)?;
    for (policy, seconds) in [("lazy", 20), ("eager", 10)] {
        let what = format!("children and grandchildren, fork:{policy}");
        let storm = storm(&program, policy, FORKS, Duration::from_secs(seconds));
        tally.check(&what, storm.map(drop));
    }
    tally.check("the cost of a fork", cost(&program).map(drop));
    tally.check("memory grows with what is touched", touched(&program));
    tally.check("children killed while they read", killed(&program));
    tally.check("the parent ends first", orphan(&program));
    tally.check("the parent is killed before a touch", bereft(&program));
    tally.check("what a child leaves is its parent's again", left(&program));
    tally.check("a child shares what it has copies of", heirs(&program));
    tally.check("granules of several mappings", in_parts(&program));
    tally.check("what the parent made read-only stays so", kept(&program));
    tally.check("originals recalled from all holders", recalled(&program));
    tally.check("the broker dies before a touch", broker_dies(&program));
    tally.check(
        "without a keeper, the broker dies",
        no_broker(&program, dir),
    );
    tally.check("the fork server is killed", no_server(&program));
    tally.check("what was spilled before", spilled(&program, dir));
    Ok(tally)
}

/// Makes the program, in `dir`.
pub(crate) fn compile(dir: &Path) -> Result<PathBuf> {
    packages::ensure(&["gcc", "libc6-dev"])?;
    let (source, program) = (dir.join("fork.c"), dir.join("fork"));
    fs::write(&source, PROGRAM)?;
    let mut compile = Command::new("cc");
    compile.args(["-O1", "-Wall", "-Werror", "-o"]);
    compile.arg(&program).arg(&source).arg("-lpthread");
    ensure!(process::run_visibly(&mut compile)?, "cc failed");
    Ok(program)
}

/// Forks while four threads allocate, and all capacity is recalled every 200 ms: so often, or as often as it can for
/// so long. Says what it did.
pub(crate) fn storm(program: &Path, policy: &str, forks: u32, at_most: Duration) -> Result<String> {
    let broker = Broker::serve("256M")?;
    let dir = tempfile::tempdir()?;
    let go = dir.path().join("go");
    let conf = format!("fork:{policy}");
    let mut run = broker.run_with(&["--conf", &conf], program);
    run.args(["24", &forks.to_string(), "4", "storm"]).arg(&go);
    let mut storm = Background::start(run.arg(at_most.as_secs().to_string()))?;
    storm.wait_for("ready", LIMIT)?;
    let (mut recalls, mut returned, mut forked) = (0, 0, 0);
    while !storm.stdout_so_far().contains("at rest") {
        ensure!(!storm.has_ended()?, "it ended: {}", storm.stderr_tail());
        thread::sleep(Duration::from_millis(200));
        let receipt = broker.order_json(&["release", "256M", "--deadline", "10000"])?;
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
    let said = storm.stdout_so_far();
    let made = said.lines().find_map(|line| line.strip_prefix("forked "));
    let made: f64 = made.context("it says of no forks")?.parse()?;
    let moved = broker.status_number("/total/evacuated_granules")?;
    let done = format!(
        "fork:{policy}: {made} forks, {recalls} recalls, {} MiB returned while in use, {moved} granules evacuated in \
         all, {} MiB shared",
        returned / MIB,
        forked / MIB
    );
    eprintln!("  {done}");
    ensure!(made >= 10.0, "that is too few forks to say anything");
    // Forks that move the heap come sooner than it comes back.
    ensure!(
        returned > 0 || (policy == "eager" && moved > 0),
        "nothing was moved by {recalls} recalls"
    );
    ensure!(
        (forked > 0) == (policy == "lazy"),
        "{forked} bytes were shared"
    );
    // Children and threads are gone, the heap is not.
    settles("at rest", || {
        let leased = broker.status_number("/capacity/leased")?;
        let shared = broker.status_number("/capacity/forked")?;
        let servers = fork_servers(&broker)?;
        let open: Result<Vec<usize>> = servers.iter().map(|pid| descriptors(*pid)).collect();
        let open = open?;
        let wrong = (leased > 64 * MIB || shared > 0 || servers.len() > 1)
            || open.iter().any(|count| *count > 16);
        Ok(wrong.then(|| {
            format!(
                "{leased} bytes leased, {shared} shared, fork servers with {open:?} descriptors"
            )
        }))
    })?;
    fs::write(&go, b"go")?;
    intact(storm)?;
    nothing_stays(&broker)?;
    Ok(done)
}

/// Waits until nothing is wrong any more.
fn settles(when: &str, mut wrong: impl FnMut() -> Result<Option<String>>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    while let Some(wrong) = wrong()? {
        ensure!(Instant::now() < end, "{when}: {wrong}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Forks of a large heap take no longer than forks of ordinary memory, within a factor. Says how long.
pub(crate) fn cost(program: &Path) -> Result<Vec<String>> {
    // At once most of it is in 4 KiB pages, too; slowly, the broker prepares 2 MiB pages.
    let at_once = Forks::time(program, 1024, 0)?;
    let slowly = [256, 1024].map(|mib| Forks::time(program, mib, 150));
    let [small, large] = slowly;
    let (small, large) = (small?, large?);
    let mut said = Vec::new();
    for forks in [&at_once, &small, &large] {
        let line = format!(
            "fork of {} MiB, {} in 2 MiB pages: {:.1} ms (at best {:.1}), of as much memory in 4 KiB pages \
             {:.1} ms ({:.1})",
            forks.mib,
            forks.huge / 1024,
            median(&forks.heap),
            best(&forks.heap),
            median(&forks.plain),
            best(&forks.plain),
        );
        eprintln!("  {line}");
        said.push(line);
    }
    // The best of each: everything else that runs meanwhile can only add to it.
    for forks in [&at_once, &large] {
        let (heap, plain) = (best(&forks.heap), best(&forks.plain));
        ensure!(
            heap <= 3.0 * plain,
            "a fork of 1 GiB takes {heap:.1} ms on extents, {plain:.1} ms in 4 KiB pages"
        );
    }
    let growth = best(&large.heap) / best(&small.heap);
    if large.huge >= 900 << 10 && small.huge >= 225 << 10 {
        ensure!(
            growth < 4.0,
            "four times the heap takes {growth:.1} times as long"
        );
    } else {
        let skipped = "SKIPPED: how the time grows, because not all is in 2 MiB pages here";
        eprintln!("  {skipped}");
        said.push(skipped.into());
    }
    Ok(said)
}

struct Forks {
    mib: usize,
    heap: Vec<f64>,
    plain: Vec<f64>,
    /// KiB of the heap that are mapped in 2 MiB pages, at least.
    huge: usize,
}

impl Forks {
    fn time(program: &Path, mib: usize, pause: usize) -> Result<Self> {
        let size = format!("{}M", mib + 128);
        let broker = Broker::serve_all(&size)?;
        let mut run = broker.run_with(LAZY, program);
        run.args([&mib.to_string(), "12", "0", "cost", &pause.to_string()]);
        let run = Background::start(&mut run)?;
        let said = intact(run)?;
        let numbers = |what: &str| -> Result<Vec<f64>> {
            let lines = said.lines().filter_map(|line| line.strip_prefix(what));
            Ok(lines
                .map(str::trim)
                .map(str::parse)
                .collect::<Result<_, _>>()?)
        };
        let huge = numbers("mapped ")?;
        Ok(Self {
            mib,
            heap: numbers("heap ")?,
            plain: numbers("plain ")?,
            huge: best(&huge) as usize,
        })
    }
}

fn best(times: &[f64]) -> f64 {
    times.iter().copied().fold(f64::INFINITY, f64::min)
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A child takes DRAM for what it touches, and little before.
fn touched(program: &Path) -> Result<()> {
    let broker = Broker::serve("512M")?;
    // What a child has it would bring to extents again.
    let options = ["--conf", "fork:lazy,promote:0"];
    let mut run = broker.run_with(&options, program);
    let said = intact(Background::start(run.args(["384", "0", "0", "touch"]))?)?;
    let numbers = |what: &str| -> Result<Vec<f64>> {
        let lines = said.lines().filter_map(|line| line.strip_prefix(what));
        Ok(lines
            .map(str::trim)
            .map(str::parse)
            .collect::<Result<_, _>>()?)
    };
    let (before, touched, grew) = (numbers("before ")?, numbers("touched ")?, numbers("grew ")?);
    ensure!(touched.len() == 3 && grew.len() == 3, "it said {said}");
    eprintln!("  KiB in children before {before:?}, after touching {touched:?} more by {grew:?}");
    for (i, touched) in touched.iter().enumerate() {
        // Whole granules, at either end; and what else lies in the same.
        let most = touched * 1.1 + 16.0 * 1024.0;
        ensure!(
            before[i] < 32.0 * 1024.0 && (*touched..most).contains(&grew[i]),
            "not as much as it touches"
        );
    }
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
    is_well(&well)?;
    nothing_stays(&broker)
}

/// Waits until a child that nobody waits for has said that it is well.
fn is_well(well: &Path) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while !well.exists() {
        ensure!(Instant::now() < end, "the child saw another heap, or hangs");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn bereft(program: &Path) -> Result<()> {
    let mut held = Held::start(program, LAZY, "bereft")?.shared(64 * MIB)?;
    let parent = children(held.program.id())?.first().copied();
    let parent = parent.context("dcm run has no program")?;
    let parent = Pid::from_raw(parent.cast_signed()).context("no process")?;
    kill_process(parent, Signal::KILL)?;
    let end = Instant::now() + LIMIT;
    while !held.program.has_ended()? {
        ensure!(Instant::now() < end, "it does not end");
        thread::sleep(Duration::from_millis(20));
    }
    let shared = held.broker.status_number("/capacity/forked")?;
    ensure!(
        shared >= 64 * MIB,
        "only {shared} bytes are still the child's"
    );
    // Half of it while nobody but the child needs it.
    let order = ["release", "224M", "--deadline", "60000"];
    let receipt = held.broker.order_json(&order)?;
    ensure!(
        broker::number(&receipt, "/returned")? == 224 * MIB,
        "not all came back: {receipt}"
    );
    fs::write(&held.go, b"go")?;
    is_well(&held.go.with_extension("well"))?;
    nothing_stays(&held.broker)
}

/// A child that is killed leaves the originals to its parent, which takes them back as they are.
fn left(program: &Path) -> Result<()> {
    let mut held = Held::start(program, LAZY, "rest")?.shared(64 * MIB)?;
    held.program.wait_for("alone", LIMIT)?;
    settles("alone", || {
        let shared = held.broker.status_number("/capacity/forked")?;
        Ok((shared > 0).then(|| format!("{shared} bytes are still shared")))
    })?;
    let status = held.broker.order_json(&["status"])?;
    let on_extents = broker::number(&status, "/clients/0/stats/extent_live_bytes")?;
    let leased = broker::number(&status, "/clients/0/leased")?;
    ensure!(
        on_extents >= 64 * MIB && leased >= 64 * MIB,
        "{on_extents} bytes on extents, {leased} leased"
    );
    held.finish()
}

/// The parent takes back what is around a page that it made read-only, and not that.
fn kept(program: &Path) -> Result<()> {
    let mut held = Held::start(program, LAZY, "kept")?.shared(64 * MIB)?;
    held.program.wait_for("alone", LIMIT)?;
    settles("alone", || {
        let shared = held.broker.status_number("/capacity/forked")?;
        let some = (2 * MIB..=40 * MIB).contains(&shared);
        Ok((!some).then(|| format!("{shared} bytes are still shared")))
    })?;
    held.finish()
}

/// A parent and a child that hold the same 64 MiB and have not looked at them since the fork.
struct Held {
    broker: Broker,
    program: Background,
    go: PathBuf,
    _dir: tempfile::TempDir,
}

impl Held {
    fn start(program: &Path, options: &[&str], how: &str) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let go = dir.path().join("go");
        let broker = Broker::serve("256M")?;
        let mut run = broker.run_with(options, program);
        let program = Background::start(run.args(["64", "1", "0", how]).arg(&go))?;
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

/// A grandchild has its heap from two fork servers, which have something else at the same addresses.
fn heirs(program: &Path) -> Result<()> {
    let broker = Broker::serve("256M")?;
    // What is freed is given back at once, and may be handed out as zeroes.
    let options = ["--conf", "fork:lazy,decay:0"];
    let mut run = broker.run_with(&options, program);
    intact(Background::start(run.args(["64", "1", "0", "heirs"]))?)?;
    let shared = broker.status_number("/counters/forked_bytes")?;
    ensure!(
        shared >= 80 * MIB,
        "the child shared nothing of its own: {shared} bytes in all"
    );
    nothing_stays(&broker)
}

/// Parent and child call mlock, mprotect and madvise on what they have not touched.
fn in_parts(program: &Path) -> Result<()> {
    Held::start(program, LAZY, "split")?
        .shared(64 * MIB)?
        .finish()
}

fn recalled(program: &Path) -> Result<()> {
    let held = Held::start(program, LAZY, "hold")?.shared(64 * MIB)?;
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
    let held = Held::start(program, LAZY, "hold")?.shared(64 * MIB)?;
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

/// Nobody has what a child has not touched: it gets SIGBUS, and no zeroes.
fn no_server(program: &Path) -> Result<()> {
    let held = Held::start(program, LAZY, "bereft")?.shared(64 * MIB)?;
    let server = fork_servers(&held.broker)?.first().copied();
    let server = Pid::from_raw(server.context("no fork server")?.cast_signed());
    kill_process(server.context("no process")?, Signal::KILL)?;
    settles("without a fork server", || {
        let shared = held.broker.status_number("/capacity/forked")?;
        Ok((shared > 0).then(|| format!("{shared} bytes are still shared")))
    })?;
    fs::write(&held.go, b"go")?;
    let parent = children(held.program.id())?.first().copied();
    let parent = parent.context("dcm run has no program")?;
    settles("without a fork server", || {
        let child = children(parent)?.first().copied().context("no child")?;
        let stat = fs::read_to_string(format!("/proc/{child}/stat"))?;
        // How it ended is the last of proc(5)'s fields.
        let ended = stat
            .contains(") Z ")
            .then(|| stat.split_whitespace().next_back());
        Ok(match ended.flatten() {
            None => Some("the child waits".into()),
            Some("7") => None,
            Some(how) => Some(format!("the child ended with status {how}")),
        })
    })?;
    ensure!(
        !held.go.with_extension("well").exists() && held.program.stderr_tail().is_empty(),
        "the child read something: {}",
        held.program.stderr_tail()
    );
    let parent = Pid::from_raw(parent.cast_signed()).context("no process")?;
    kill_process(parent, Signal::KILL)?;
    held.program.finish(LIMIT)?;
    nothing_stays(&held.broker)
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

/// `dcm run` without a server: its broker has no keeper. Who holds originals does not need it.
fn no_broker(program: &Path, dir: &Path) -> Result<()> {
    let go = dir.join("go-without");
    let mut run = Command::new(workspace::dcm());
    run.args(["run", "--emulate", "256M", "--placement", "dc"])
        .args(LAZY);
    run.arg("--").arg(program);
    let mut program = Background::start(run.args(["64", "1", "0", "hold"]).arg(&go))?;
    program.wait_for("ready", LIMIT)?;
    // The fork server is the broker's child.
    let (mut broker, end) = (None, Instant::now() + LIMIT);
    while broker.is_none() {
        ensure!(Instant::now() < end, "no fork server");
        thread::sleep(Duration::from_millis(50));
        for pid in children(program.id())? {
            if !serving_forks(pid)?.is_empty() {
                broker = Pid::from_raw(pid.cast_signed());
            }
        }
    }
    // Time for the fork itself.
    thread::sleep(Duration::from_millis(500));
    kill_process(broker.context("no process")?, Signal::KILL)?;
    thread::sleep(Duration::from_millis(200));
    fs::write(&go, b"go")?;
    intact(program).map(drop)
}

/// Waits for its end; what it said.
fn intact(program: Background) -> Result<String> {
    let finished = program.finish(LIMIT)?;
    ensure!(
        finished.success() && finished.stdout.ends_with("intact\n"),
        "the program: {} {} {}",
        finished.ending(),
        finished.stdout.trim(),
        finished.stderr.trim()
    );
    Ok(finished.stdout)
}

/// No lease, no client, no fork server, and no descriptor of either.
fn nothing_stays(broker: &Broker) -> Result<()> {
    settles("at the end", || {
        let status = broker.order_json(&["status"])?;
        let leased = broker::number(&status, "/capacity/leased")?;
        let clients = status.pointer("/clients").and_then(|c| c.as_array());
        let living = clients.map_or(0, |all| all.iter().filter(|c| c["ended"] == false).count());
        let fds = descriptors(worker(broker)?.as_raw_nonzero().get().cast_unsigned())?;
        let servers = fork_servers(broker)?.len();
        let wrong = leased > 0 || living > 0 || fds >= 32 || servers > 0;
        Ok(wrong.then(|| {
            format!(
                "{leased} bytes leased, {living} clients live, the broker has {fds} descriptors, \
                 {servers} fork servers"
            )
        }))
    })
}

fn descriptors(pid: u32) -> Result<usize> {
    match fs::read_dir(format!("/proc/{pid}/fd")) {
        Ok(all) => Ok(all.count()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error.into()),
    }
}

fn children(pid: u32) -> Result<Vec<u32>> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    Ok(children
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?)
}

/// The children of a broker that serve forks.
fn serving_forks(broker: u32) -> Result<Vec<u32>> {
    let serves = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0)
            .any(|word| word == b"serve-forks")
    };
    Ok(children(broker)?.into_iter().filter(serves).collect())
}

fn fork_servers(broker: &Broker) -> Result<Vec<u32>> {
    serving_forks(worker(broker)?.as_raw_nonzero().get().cast_unsigned())
}
