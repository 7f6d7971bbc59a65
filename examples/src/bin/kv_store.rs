//! A key-value store on dynamic capacity: fills itself, changes records for a while, and verifies every one.
//! Its records are in one arena and what it has worked out of them in another: under pressure the second is
//! dropped, and the records are moved while they are in use.
//!
//! ```console
//! $ dcm serve --emulate 1G --offer 512M --socket /tmp/dcm.sock &
//! $ DCM_SOCKET=/tmp/dcm.sock cargo run --release --package dcmalloc-examples --bin kv_store
//! ```
//!
//! It draws where its heap lies, here around a `dcm release 192M`:
//!
//! ```text
//! changing: |##############################  | 127 MiB on extents,   0 MiB in DRAM
//! changing: |##############...............   |  55 MiB on extents,  66 MiB in DRAM
//! changing: |#############################   | 121 MiB on extents,   0 MiB in DRAM
//! ```
//!
//! Without a broker it runs in DRAM, and says so.

#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Parser;
use dcmalloc::{BrokerSource, Config, DcMalloc, Placement};
use dcmalloc_examples::draw;
use dcmalloc_examples::store::{Damaged, Store};

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
    let mut store = Tables::new()?;
    let mut random = Random(0x2545_f491_4f6c_dd1d);

    for key in 0..options.records {
        store.put(key, &random.value());
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
        .records
        .verify()
        .map_err(|damaged| anyhow!("record {} is damaged", damaged.key))?;
    ensure!(
        verified == store.records.len(),
        "verified {verified} of {} records",
        store.records.len()
    );
    println!("verified {verified} records, none damaged");
    Ok(())
}

/// What is kept, and what can be worked out again.
struct Tables {
    records: Store,
    views: Arc<Mutex<Views>>,
}

/// The beginnings of records as text, once somebody has asked.
#[derive(Default)]
struct Views {
    texts: Option<Store>,
    /// How often they were dropped under pressure.
    dropped: u32,
}

impl Tables {
    /// An arena for each: that of the views is asked first under pressure.
    fn new() -> Result<Self> {
        let views: Arc<Mutex<Views>> = Arc::default();
        let weak = Arc::downgrade(&views);
        let arena = HEAP
            .arena("views")
            .on_pressure(move |_| {
                if let Some(views) = weak.upgrade() {
                    let mut views = lock(&views);
                    views.dropped += 1;
                    views.texts.as_mut().map(Store::clear);
                }
            })
            .build()?;
        lock(&views).texts = Some(Store::new_in(arena));
        let records = HEAP.arena("records").priority(10).build()?;
        Ok(Self {
            records: Store::new_in(records),
            views,
        })
    }

    fn put(&mut self, key: u64, value: &[u8]) {
        self.remove(key);
        self.records.put(key, value);
    }

    fn remove(&mut self, key: u64) {
        self.records.remove(key);
        lock(&self.views)
            .texts
            .as_mut()
            .map(|texts| texts.remove(key));
    }

    /// Looks at the text of a record, which is kept; whether it is what it should be.
    fn view(&self, key: u64) -> Result<(), Damaged> {
        let Some(value) = self.records.get(key)? else {
            return Ok(());
        };
        let mut views = lock(&self.views);
        if let Some(texts) = &mut views.texts
            && texts.get(key)?.is_none()
        {
            let text = value[..value.len().min(100)].escape_ascii().to_string();
            texts.put(key, text.as_bytes());
        }
        Ok(())
    }
}

fn lock(views: &Mutex<Views>) -> MutexGuard<'_, Views> {
    views.lock().unwrap_or_else(PoisonError::into_inner)
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
fn churn(store: &mut Tables, random: &mut Random, options: &Options) -> Result<u64> {
    let start = Instant::now();
    let limit = Duration::from_secs_f64(options.seconds);
    let mut next_report = Duration::from_secs(1);
    let mut changes = 0;
    while start.elapsed() < limit {
        for _ in 0..1000 {
            let key = random.next() % options.records.max(1);
            match random.next() % 8 {
                0 => store.put(key, &random.value()),
                1 => store.remove(key),
                _ => {
                    store
                        .view(key)
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

fn report(what: &str, store: &Tables) {
    let usage = HEAP.stats().usage;
    let views = lock(&store.views);
    println!(
        "{what}: {}; {} records, {} views, dropped {} times",
        draw::tiers(usage.extent_live, usage.dram_live, usage.live_peak),
        store.records.len(),
        views.texts.as_ref().map_or(0, Store::len),
        views.dropped
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
