//! SQLite with its page cache in an arena: looks rows up at random, checks every one, and gives half of the
//! cache back when capacity is asked for.
//!
//! ```console
//! $ dcm serve --emulate 256M --socket /tmp/dcm.sock &
//! $ DCM_SOCKET=/tmp/dcm.sock cargo run --release --package dcmalloc-examples --bin sqlite_cache &
//! $ dcm release 224M --socket /tmp/dcm.sock
//! ```
//!
//! It draws how much of the database is in the cache:
//!
//! ```text
//! 0.5 s |############################### |  61 MiB,  87 % of reads were hits
//! 1.5 s |###############                 |  29 MiB,  87 % of reads were hits
//! 2.6 s |###############                 |  29 MiB,  87 % of reads were hits
//! 3.6 s |###########################     |  53 MiB,  94 % of reads were hits
//! ```
//!
//! Without a broker it runs in DRAM, and says so.

#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use dcmalloc::{DcMalloc, OnExhausted};
use dcmalloc_examples::{draw, page_cache};
use rusqlite::Connection;

#[global_allocator]
static HEAP: DcMalloc = DcMalloc::new();

/// Bytes of one row's text.
const ROW: usize = 400;

#[derive(Debug, Parser)]
#[command(about = "SQLite's page cache on dynamic capacity")]
struct Options {
    /// MiB of the database, about
    #[arg(long, default_value_t = 96)]
    database: usize,
    /// MiB that the cache grows to
    #[arg(long, default_value_t = 64)]
    cache: usize,
    /// Seconds of looking up
    #[arg(long, default_value_t = 6.0)]
    seconds: f64,
    /// Where the database is made
    #[arg(long, default_value = ".")]
    directory: PathBuf,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Err(error) = dcmalloc::attach(&HEAP) {
        println!("no extents, everything is in DRAM: {error}");
    }
    let arena = HEAP
        .arena("page cache")
        .on_exhausted(OnExhausted::Dram)
        .on_pressure(|pressure| {
            page_cache::shrink(pressure.bytes);
        })
        .build()?;
    page_cache::install(arena)?;

    let path = options
        .directory
        .join(format!(".sqlite_cache.{}", std::process::id()));
    let looked_up = Connection::open(&path)
        .with_context(|| path.display().to_string())
        .and_then(|database| {
            let rows = fill(&database, &options)?;
            look_up(&database, rows, &options)
        });
    std::fs::remove_file(&path)?;
    println!("looked up {} rows, all of them as written", looked_up?);
    Ok(())
}

/// What row `number` says.
fn text(number: i64) -> String {
    format!("{number:0ROW$}")
}

/// Makes the table; how many rows it has.
fn fill(database: &Connection, options: &Options) -> Result<i64> {
    database.pragma_update(None, "journal_mode", "off")?;
    database.pragma_update(None, "synchronous", "off")?;
    database.pragma_update(None, "cache_size", -((options.cache << 10) as i64))?;
    // SQLite would map the file past the cache, or keep pages of its own.
    database.pragma_update(None, "mmap_size", 0)?;
    database.execute_batch("CREATE TABLE rows(number INTEGER PRIMARY KEY, text TEXT); BEGIN")?;
    let rows = ((options.database << 20) / (ROW + 16)) as i64;
    let mut insert = database.prepare("INSERT INTO rows VALUES (?1, ?2)")?;
    for number in 0..rows {
        insert.execute((number, text(number)))?;
    }
    database.execute_batch("COMMIT")?;
    Ok(rows)
}

/// Looks rows up until the time is over, most of them in two fifths of the table; how many.
fn look_up(database: &Connection, rows: i64, options: &Options) -> Result<u64> {
    let mut select = database.prepare("SELECT text FROM rows WHERE number = ?1")?;
    let (start, mut drawn) = (Instant::now(), Duration::ZERO);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: i64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below.max(1) as u64) as i64
    };
    let (mut before, mut shrunk, mut looked_up) = (page_cache::held().1, None, 0);
    while start.elapsed() < Duration::from_secs_f64(options.seconds) {
        let often = next(4) > 0;
        let number = next(if often { rows * 2 / 5 } else { rows });
        let found: String = select.query_row([number], |row| row.get(0))?;
        ensure!(found == text(number), "row {number} is not as written");
        looked_up += 1;
        // What was asked back is not taken again at once.
        match shrunk {
            None if page_cache::is_shrunk() => shrunk = Some(Instant::now()),
            Some(since) if since.elapsed() > Duration::from_secs(2) => {
                page_cache::may_grow();
                shrunk = None;
            }
            _ => {}
        }
        if start.elapsed() >= drawn + Duration::from_millis(500) {
            drawn = start.elapsed();
            let (held, reads) = page_cache::held();
            println!(
                "{}",
                draw::line(drawn, held, options.cache << 20, before, reads)
            );
            before = reads;
        }
    }
    let whole: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0))?;
    ensure!(whole == "ok", "the database is damaged: {whole}");
    Ok(looked_up)
}
