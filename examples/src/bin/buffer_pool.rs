//! A buffer pool over a file larger than its memory, on dynamic capacity: reads pages at random, checks
//! every one, and gives half of its memory back when it is asked for.
//!
//! ```console
//! $ dcm serve --emulate 256M --socket /tmp/dcm.sock &
//! $ DCM_SOCKET=/tmp/dcm.sock cargo run --release --package dcmalloc-examples --bin buffer_pool &
//! $ dcm release 224M --socket /tmp/dcm.sock
//! ```
//!
//! It draws how much memory it has:
//!
//! ```text
//! 3.0 s |################################|  64 MiB,  87 % of reads were hits
//! 3.5 s |###############                 |  30 MiB,  77 % of reads were hits
//! 5.0 s |###############                 |  30 MiB,  62 % of reads were hits
//! 6.0 s |################################|  64 MiB,  86 % of reads were hits
//! ```
//!
//! Without a broker it runs in DRAM, and says so.

#![forbid(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use dcmalloc::{DcMalloc, OnExhausted};
use dcmalloc_examples::draw;
use dcmalloc_examples::pool::{PAGE, Pool, SLAB_FRAMES};

#[global_allocator]
static HEAP: DcMalloc = DcMalloc::new();

#[derive(Debug, Parser)]
#[command(about = "A buffer pool on dynamic capacity")]
struct Options {
    /// MiB of the file
    #[arg(long, default_value_t = 128)]
    file: u64,
    /// MiB that the pool grows to
    #[arg(long, default_value_t = 64)]
    pool: usize,
    /// Seconds of reading
    #[arg(long, default_value_t = 6.0)]
    seconds: f64,
    /// Where the file is made; O_DIRECT must work there
    #[arg(long, default_value = ".")]
    directory: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Err(error) = dcmalloc::attach(&HEAP) {
        println!("no extents, everything is in DRAM: {error}");
    }
    let pages = options.file * (1 << 20) / PAGE as u64;
    let file = filled(&options.directory, pages)?;
    let most = options.pool * (1 << 20) / (SLAB_FRAMES * PAGE);

    let pool: Arc<Mutex<Option<Pool>>> = Arc::default();
    let weak = Arc::downgrade(&pool);
    let arena = HEAP
        .arena("pool")
        .on_exhausted(OnExhausted::Dram)
        .on_pressure(move |pressure| {
            if let Some(pool) = weak.upgrade()
                && let Some(pool) = lock(&pool).as_mut()
            {
                pool.shrink(pressure.bytes);
            }
        })
        .build()?;
    *lock(&pool) = Some(Pool::new(file, arena, most.max(1))?);

    let checked = read_at_random(&pool, pages, most, &options)?;
    println!("read {checked} pages, all of them as written");
    Ok(())
}

fn lock(pool: &Mutex<Option<Pool>>) -> MutexGuard<'_, Option<Pool>> {
    pool.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file without a name, each word of which says where it is.
fn filled(directory: &Path, pages: u64) -> Result<File> {
    let path = directory.join(format!(".buffer_pool.{}", std::process::id()));
    let mut file = File::create(&path).with_context(|| path.display().to_string())?;
    let direct = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(&path);
    std::fs::remove_file(&path)?;
    let direct = direct.with_context(|| {
        let directory = directory.display();
        format!("{directory} takes no O_DIRECT: name another one with --directory")
    })?;
    for page in 0..pages {
        file.write_all(&content(page))?;
    }
    file.sync_data()?;
    Ok(direct)
}

fn content(page: u64) -> Vec<u8> {
    let words = (0..PAGE as u64 / 8).map(|word| (page << 16 | word).to_le_bytes());
    words.flatten().collect()
}

/// Reads batches of pages until the time is over, most of them from a fifth of the file; returns how many.
fn read_at_random(
    pool: &Mutex<Option<Pool>>,
    pages: u64,
    most: usize,
    options: &Options,
) -> Result<u64> {
    const BATCH: usize = 32;
    let (start, mut drawn) = (Instant::now(), Duration::ZERO);
    let (mut random, mut checked, mut damaged) = (0x2545_f491_4f6c_dd1d_u64, 0, 0);
    let (mut before, mut shrunk) = ((0, 0), None);
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below.max(1)
    };
    while start.elapsed() < Duration::from_secs_f64(options.seconds) {
        let batch: Vec<u64> = (0..BATCH)
            .map(|_| {
                let often = next(4) > 0;
                next(if often { pages / 5 } else { pages })
            })
            .collect();
        let mut guard = lock(pool);
        let pool = guard.as_mut().context("the pool is there")?;
        pool.with_pages(&batch, |page, bytes| {
            checked += 1;
            damaged += u64::from(bytes != content(page));
        })?;
        ensure!(damaged == 0, "{damaged} pages are not as written");
        // What was asked back is not taken again at once.
        match shrunk {
            None if pool.is_shrunk(most) => shrunk = Some(Instant::now()),
            Some(since) if since.elapsed() > Duration::from_secs(2) => {
                pool.may_grow(most);
                shrunk = None;
            }
            _ => {}
        }
        if start.elapsed() >= drawn + Duration::from_millis(500) {
            drawn = start.elapsed();
            let reads = (pool.hits, pool.misses);
            let bytes = |slabs| slabs * SLAB_FRAMES * PAGE;
            println!(
                "{}",
                draw::line(drawn, bytes(pool.slabs()), bytes(most), before, reads)
            );
            before = reads;
        }
    }
    Ok(checked)
}
