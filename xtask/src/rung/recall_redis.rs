//! redis-server with 200 MiB of live keys on extents, under load, while all extents come and go: into DRAM,
//! and with too little of that into a file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Tally;
use crate::broker::{self, Broker};
use crate::packages;
use crate::process::{self, Background};
use crate::program::redis_server::Server;

const LIMIT: Duration = Duration::from_secs(180);
const KEYS: usize = 100_000;
const VALUE: usize = 2048;
/// What the keys and values alone take.
const LIVE: u64 = (KEYS * VALUE) as u64;
/// How long extents come and go.
const LOOP: Duration = Duration::from_secs(10);
/// Throughput over the loop, of what it was before: 0.7 on two idle cores, which the server, its load, the broker
/// and the copying share; less where others use them as well. Nothing moves and serves at once below this.
const LEAST_SHARE: f64 = 0.35;
const OFFER: &str = "384M";

pub(super) fn run(tally: &mut Tally) -> Result<()> {
    packages::ensure(&["redis-server", "redis-tools"])?;
    let dir = tempfile::tempdir()?;
    write_load(&dir.path().join("load"))?;
    let bare = Session::start(Command::new("redis-server"), dir.path())?;
    let digest = bare.server.digest()?;
    bare.server.end_well()?;
    tally.check(
        "redis while all its extents come and go",
        moves_to_dram(dir.path(), &digest),
    );
    tally.check(
        "redis with 32 MiB of DRAM to move to: the rest is spilled",
        spills(dir.path(), &digest),
    );
    Ok(())
}

fn moves_to_dram(dir: &Path, digest: &str) -> Result<()> {
    let broker = Broker::serve(OFFER)?;
    let session = Session::start(broker.run("redis-server".as_ref()), dir)?;
    all_on_extents(&broker)?;
    let before = session.benchmark(1_000_000)?;
    let requests = (before * LOOP.as_secs_f64() * 1.2) as u64;
    let mut load = Background::start(&mut session.load(requests))?;
    let mut pulls = Pulls::default();
    while !load.has_ended()? {
        pulls.once(&broker)?;
    }
    let took = pulls.since.elapsed();
    let during = throughput(&load.finish(LIMIT)?.stdout)?;
    session.keeps(digest)?;
    eprintln!(
        "  redis: {before:.0} requests/s before, {during:.0} ({:.2}) over {:.1} s with {} recalls, {} MiB \
         moved while in use, at {} MiB/s; slowest recall {} ms, longest stall {:.1} ms",
        during / before,
        took.as_secs_f64(),
        pulls.count,
        pulls.moved >> 20,
        (pulls.copied * 1_000_000 / pulls.moving_us.max(1)) >> 20,
        pulls.slowest_us / 1000,
        pulls.longest_stall as f64 / 1e6,
    );
    ensure!(took >= LOOP, "the loop took only {took:?}");
    ensure!(pulls.moved >= LIVE, "only {} bytes were moved", pulls.moved);
    ensure!(
        during >= LEAST_SHARE * before,
        "{during:.0} requests/s over the loop, {before:.0} before"
    );
    session.server.end_well()
}

fn spills(dir: &Path, digest: &str) -> Result<()> {
    let broker = Broker::serve(OFFER)?;
    let conf = format!("dram_limit:32M,spill_dir:{}", dir.display());
    let run = broker.run_with(&["--conf", &conf], "redis-server".as_ref());
    let session = Session::start(run, dir)?;
    all_on_extents(&broker)?;
    let mut pulls = Pulls::default();
    // Untouched: nearly all of it goes to the file, and comes back when there is capacity.
    pulls.once(&broker)?;
    ensure!(
        pulls.spilled >= LIVE / 2,
        "only {} bytes were spilled",
        pulls.spilled
    );
    // Touched all the time: it comes back to DRAM as well.
    let mut load = Background::start(&mut session.load(100_000_000))?;
    while pulls.since.elapsed() < LOOP {
        pulls.once(&broker)?;
        ensure!(!load.has_ended()?, "the load ended");
    }
    drop(load);
    session.keeps(digest)?;
    eprintln!(
        "  redis, 32 MiB of DRAM: {} recalls in {:.1} s, {} MiB spilled, {} MiB moved in all",
        pulls.count,
        pulls.since.elapsed().as_secs_f64(),
        pulls.spilled >> 20,
        pulls.moved >> 20
    );
    session.server.end_well()
}

/// Recalls of everything, and what they brought.
struct Pulls {
    since: Instant,
    count: u64,
    moved: u64,
    spilled: u64,
    copied: u64,
    moving_us: u64,
    slowest_us: u64,
    /// In nanoseconds.
    longest_stall: u64,
}

impl Default for Pulls {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            count: 0,
            moved: 0,
            spilled: 0,
            copied: 0,
            moving_us: 0,
            slowest_us: 0,
            longest_stall: 0,
        }
    }
}

impl Pulls {
    /// Recalls everything, which must come back in full, adds it again, and waits until half of the keys are
    /// on extents again.
    fn once(&mut self, broker: &Broker) -> Result<()> {
        let accepted = broker.status_number("/capacity/accepted")?;
        let order = ["release", &accepted.to_string(), "--deadline", "15000"];
        let receipt = broker.order_json(&order)?;
        let number = |pointer| broker::number(&receipt, pointer);
        ensure!(number("/returned")? == accepted, "not in full: {receipt}");
        let spilled = number("/returned_spilled")?;
        self.count += 1;
        self.spilled += spilled;
        self.moved += number("/returned_to_extents")? + number("/returned_to_dram")? + spilled;
        self.copied += number("/copied")?;
        self.moving_us += number("/moving_us")?;
        self.slowest_us = self.slowest_us.max(number("/duration_us")?);
        self.longest_stall = self.longest_stall.max(number("/stalls/max")?);
        broker.order(&["add", OFFER])?;
        all_on_extents(broker)
    }
}

/// Waits until at least half of the keys are on extents.
fn all_on_extents(broker: &Broker) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while broker.status_number("/clients/0/stats/extent_live_bytes")? < LIVE / 2 {
        ensure!(Instant::now() < end, "the keys do not come to extents");
        // Each question is a process of its own, on the cores that serve.
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A server with all keys loaded.
struct Session<'a> {
    server: Server<'a>,
    dir: &'a Path,
}

impl<'a> Session<'a> {
    fn start(mut server: Command, dir: &'a Path) -> Result<Self> {
        let server = Server::start(&mut server, dir, LIMIT)?;
        server.feed("load")?;
        Ok(Self { server, dir })
    }

    /// All keys are there and hold what they held.
    fn keeps(&self, digest: &str) -> Result<()> {
        let keys = self.server.cli(&["DBSIZE"])?;
        ensure!(keys.trim() == KEYS.to_string(), "{} keys", keys.trim());
        let now = self.server.digest()?;
        ensure!(now == digest, "digest {now}, without us {digest}");
        Ok(())
    }

    /// Reads keys at random.
    fn load(&self, requests: u64) -> Command {
        let mut load = Command::new("redis-benchmark");
        load.current_dir(self.dir)
            .args(["-s", "redis.sock", "-P", "16", "-c", "20", "--csv", "-r"])
            .args([KEYS.to_string(), "-n".into(), requests.to_string()])
            .args(["GET", "live:__rand_int__"]);
        load
    }

    /// Requests per second.
    fn benchmark(&self, requests: u64) -> Result<f64> {
        throughput(&process::run(&mut self.load(requests), LIMIT)?.stdout)
    }
}

/// The second column of the last line: `"GET live:…","123456.78",…`.
fn throughput(csv: &str) -> Result<f64> {
    let line = csv.lines().last().context("redis-benchmark said nothing")?;
    let number = line.split("\",\"").nth(1).map(|n| n.trim_matches('"'));
    number
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("redis-benchmark said {line:?}"))
}

/// Keys that are all different, as large as a page together with their like.
fn write_load(path: &Path) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for key in 0..KEYS {
        let value = format!("{key:08}").repeat(VALUE / 8);
        write!(file, "SET live:{key:012} {value}\r\n")?;
    }
    Ok(file.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_is_read_from_the_last_line() {
        let csv = "\"test\",\"rps\",\"avg\"\n\"GET live:__rand_int__\",\"123456.78\",\"0.1\"\n";
        assert_eq!(throughput(csv).unwrap(), 123_456.78);
        assert!(throughput("\"test\",\"rps\"").is_err());
    }
}
