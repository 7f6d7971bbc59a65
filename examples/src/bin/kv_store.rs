//! A key-value store whose heap is on dynamic capacity: fills itself, changes records for a while, and
//! verifies every one. `dcm release` may take back what it does not use at any moment.
//!
//! ```console
//! $ dcm serve --emulate 1G --offer 512M --socket /tmp/dcm.sock &
//! $ DCM_SOCKET=/tmp/dcm.sock cargo run --release --package dcmalloc-examples --bin kv_store
//! ```
//!
//! Without a broker it runs in DRAM, and says so.

#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use allocator::{Config, DcMalloc, Placement};
use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use dcmalloc::BrokerSource;
use dcmalloc_examples::store::Store;

#[global_allocator]
static HEAP: DcMalloc = DcMalloc::with(Config {
    placement: Placement::Dc,
    ..Config::DEFAULT
});

static SOURCE: OnceLock<BrokerSource> = OnceLock::new();

#[derive(Debug, Parser)]
#[command(about = "A key-value store on dynamic capacity")]
struct Options {
    /// Records to put
    #[arg(long, default_value_t = 150_000)]
    records: u64,
    /// Seconds of putting, removing and reading at random in between
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// The broker's socket
    #[arg(long, env = "DCM_SOCKET", default_value = "/run/dcmalloc/broker.sock")]
    socket: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Err(error) = attach(options.socket.clone()) {
        println!("no extents, everything is in DRAM: {error:#}");
    }
    let mut store = Store::new();
    let mut random = Random(0x2545_f491_4f6c_dd1d);

    for key in 0..options.records {
        store.put(key, random.value());
        if (key + 1) % (options.records / 5).max(1) == 0 {
            report("written", &store);
        }
    }
    // Every second one goes: its memory is free, and between live neighbours.
    for key in (0..options.records).step_by(2) {
        store.remove(key);
    }
    report("thinned", &store);

    let changes = churn(&mut store, &mut random, &options)?;
    report(&format!("changed {changes} times"), &store);

    let verified = store
        .verify()
        .map_err(|damaged| anyhow!("record {} is damaged", damaged.key))?;
    ensure!(
        verified == store.len(),
        "verified {verified} of {} records",
        store.len()
    );
    println!("verified {verified} records, none damaged");
    Ok(())
}

/// Connects to the broker; from then on the heap grows onto extents.
fn attach(socket: PathBuf) -> Result<()> {
    let path = CString::new(socket.clone().into_os_string().into_vec())?;
    let source = BrokerSource::connect(&path, 0).with_context(|| socket.display().to_string())?;
    HEAP.attach(SOURCE.get_or_init(|| source))
        .context("no memory for the heap's tables")?;
    Ok(())
}

/// Puts, removes and reads at random until the time is over; returns the number of changes.
fn churn(store: &mut Store, random: &mut Random, options: &Options) -> Result<u64> {
    let start = Instant::now();
    let limit = Duration::from_secs_f64(options.seconds);
    let mut next_report = Duration::from_secs(1);
    let mut changes = 0;
    while start.elapsed() < limit {
        for _ in 0..1000 {
            let key = random.next() % options.records.max(1);
            match random.next() % 8 {
                0 => store.put(key, random.value()),
                1 => drop(store.remove(key)),
                _ => {
                    store
                        .get(key)
                        .map_err(|damaged| anyhow!("record {} is damaged", damaged.key))?;
                    continue;
                }
            }
            changes += 1;
        }
        if start.elapsed() >= next_report {
            next_report += Duration::from_secs(1);
            report("changing", store);
        }
    }
    Ok(changes)
}

fn report(what: &str, store: &Store) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let usage = HEAP.stats().usage;
    println!(
        "{what}: {} records, {:.0} MiB of values; heap {:.0} MiB on extents, {:.0} MiB in DRAM",
        store.len(),
        mib(store.value_bytes() as u64),
        mib(usage.extent_live),
        mib(usage.dram_live)
    );
}

/// xorshift: the same store each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// 100 to 4,000 bytes.
    fn value(&mut self) -> Box<[u8]> {
        let len = 100 + self.next() % 3901;
        let first = self.next();
        (0..len)
            .map(|i| (first.wrapping_add(i) >> (i % 8)) as u8)
            .collect()
    }
}
