//! redis-server with 200 MiB of live keys on extents, under load, while all extents come and go: into DRAM,
//! and with too little of that into a file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dcmalloc_benches::report::median;

use super::Tally;
use crate::broker::{self, Broker};
use crate::others::{self, Others};
use crate::packages;
use crate::process::Background;
use crate::program::redis_server::Server;

const LIMIT: Duration = Duration::from_secs(180);
const KEYS: usize = 100_000;
const VALUE: usize = 2048;
/// What the keys and values alone take.
const LIVE: u64 = (KEYS * VALUE) as u64;
/// How long extents come and go, in all.
const LOOP: Duration = Duration::from_secs(10);
/// So many loops there are at most: one that holds is enough, because one of four does not on a quiet machine.
const LOOPS: usize = 3;
/// Windows of calm, each followed by one in which extents come and go: what others do on the machine meets both.
const WINDOWS: u32 = 5;
/// Throughput while extents come and go, of what it is between: 0.55 to 0.76, in the middle 0.63, on two processors,
/// which the server, its load, the broker and the copying share.
const LEAST_SHARE: f64 = 0.6;
/// The same where others use the processors as well, and the copying takes what the server had left.
const LEAST_SHARE_SHARED: f64 = 0.35;
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
    let mut load = Background::start(&mut session.load())?;
    let mut pulls = Pulls::default();
    let mut measured = Vec::new();
    let holds = loop {
        let loops = Loop::measure(&session, &broker, &mut pulls)?;
        ensure!(!load.has_ended()?, "the load ended");
        let holds = loops.share >= loops.least;
        measured.push(format!("{:.2} (at least {})", loops.share, loops.least));
        if holds || measured.len() == LOOPS {
            break holds;
        }
    };
    drop(load);
    session.keeps(digest)?;
    eprintln!(
        "  redis: {} recalls, {} MiB moved while in use, at {} MiB/s; slowest recall {} ms, longest stall {:.1} ms",
        pulls.count,
        pulls.moved >> 20,
        (pulls.copied * 1_000_000 / pulls.moving_us.max(1)) >> 20,
        pulls.slowest_us / 1000,
        pulls.longest_stall as f64 / 1e6,
    );
    ensure!(pulls.moved >= LIVE, "only {} bytes were moved", pulls.moved);
    ensure!(
        holds,
        "throughput under recalls, of what it is between: {}",
        measured.join(", ")
    );
    session.server.end_well()
}

/// One loop of windows.
struct Loop {
    /// Throughput under recalls, of what it is between.
    share: f64,
    /// What it must be, by what others had of the processors.
    least: f64,
}

impl Loop {
    fn measure(session: &Session, broker: &Broker, pulls: &mut Pulls) -> Result<Self> {
        let (mut calm, mut stormy) = (Vec::new(), Vec::new());
        let others = Others::watch()?;
        for _ in 0..WINDOWS {
            calm.push(session.throughput(|| {
                thread::sleep(LOOP / WINDOWS);
                Ok(())
            })?);
            stormy.push(session.throughput(|| {
                let end = Instant::now() + LOOP / WINDOWS;
                while Instant::now() < end {
                    pulls.once(broker)?;
                }
                Ok(())
            })?);
        }
        let others = others.share()?;
        let (calm, stormy) = (median(calm), median(stormy));
        let share = stormy / calm;
        eprintln!(
            "  redis: {calm:.0} requests/s between, {stormy:.0} ({share:.2}) under recalls; others had {:.0} % of \
             the processors",
            others * 100.0
        );
        let least = match others::is_quiet(others) {
            true => LEAST_SHARE,
            false => LEAST_SHARE_SHARED,
        };
        Ok(Self { share, least })
    }
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
    let mut load = Background::start(&mut session.load())?;
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

    /// Reads keys at random, for longer than anybody listens.
    fn load(&self) -> Command {
        let mut load = Command::new("redis-benchmark");
        load.current_dir(self.dir)
            .args(["-s", "redis.sock", "-P", "16", "-c", "20", "--csv", "-r"])
            .args([KEYS.to_string(), "-n".into(), "1000000000".into()])
            .args(["GET", "live:__rand_int__"]);
        load
    }

    /// Requests per second that it serves while `f` runs.
    fn throughput(&self, f: impl FnOnce() -> Result<()>) -> Result<f64> {
        let (start, before) = (Instant::now(), self.served()?);
        f()?;
        let served = self.served()? - before;
        Ok(served as f64 / start.elapsed().as_secs_f64())
    }

    /// Requests served so far.
    fn served(&self) -> Result<u64> {
        served(&self.server.cli(&["INFO", "stats"])?)
    }
}

/// Of the lines of INFO, that of requests.
fn served(info: &str) -> Result<u64> {
    let mut lines = info.lines();
    let number = lines.find_map(|line| line.strip_prefix("total_commands_processed:"));
    number
        .and_then(|number| number.trim().parse().ok())
        .context("INFO tells no number of requests")
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
    fn requests_are_read_from_info() {
        let info = "# Stats\r\ntotal_connections_received:3\r\ntotal_commands_processed:1234\r\n";
        assert_eq!(served(info).unwrap(), 1234);
        assert!(served("# Stats\r\n").is_err());
    }
}
