//! `cargo xtask demo`: a software device, capacity offered in one group of three extents, a key-value store
//! and SQLite on it, half of the free capacity released while they run, every record verified.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::broker::{self, Broker};
use crate::process::Background;
use crate::program::sqlite;
use crate::rung::build;
use crate::{packages, workspace};

const LIMIT: Duration = Duration::from_secs(60);

/// Runs it; an error when anything was lost.
pub(crate) fn run() -> Result<()> {
    packages::ensure(&["gcc", "libc6-dev", "sqlite3"])?;
    println!("building");
    ensure!(build::release()?, "the release build failed");
    let start = Instant::now();

    heading(
        "a software device of 1 GiB; the fabric manager offers 512M,256M,128M in one More group",
    );
    let broker = Broker::serve("512M,256M,128M")?;
    print!("{}", broker.order(&["status"])?);
    ensure!(
        broker.status_number("/device/counters/groups_answered")? == 1,
        "three extents of one group take one answer"
    );

    heading("a key-value store and SQLite, both on extents only");
    let mut store = Background::start(&mut key_value_store(&broker))?;
    let shell = Background::start(&mut sqlite_shell(&broker))?;
    let mut seen = 0;
    follow(&mut store, &mut seen, "thinned")?;
    // SQLite is in the middle of its work about now.
    thread::sleep(Duration::from_millis(500));

    heading("midway: half of the free capacity is released");
    print!("{}", broker.order(&["status"])?);
    release_half_of_free(&broker)?;
    print!("{}", broker.order(&["status"])?);

    heading("the programs go on");
    follow(&mut store, &mut seen, "verified")?;
    let store = store.finish(LIMIT)?;
    ensure!(
        store.success(),
        "the store: {} {}",
        store.ending(),
        store.stderr.trim()
    );
    let shell = shell.finish(LIMIT)?;
    ensure!(
        shell.success(),
        "sqlite3: {} {}",
        shell.ending(),
        shell.stderr.trim()
    );
    ensure!(
        shell.stdout.lines().any(|line| line == "ok"),
        "sqlite3 found damage: {}",
        shell.stdout
    );
    println!(
        "sqlite3: integrity_check {}",
        shell.stdout.lines().nth(1).unwrap_or_default()
    );

    heading("both have ended: nothing is leased any more");
    let ended = Instant::now();
    while broker.status_number("/capacity/leased")? > 0 {
        ensure!(
            ended.elapsed() < Duration::from_secs(2),
            "leases outlive the programs"
        );
        thread::sleep(Duration::from_millis(10));
    }
    print!("{}", broker.order(&["status"])?);
    println!("\nnothing was lost; {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn heading(text: &str) {
    println!("\n== {text}");
}

/// It has dcmalloc as its global allocator and connects by itself.
fn key_value_store(broker: &Broker) -> Command {
    let mut store = Command::new(workspace::release("kv_store"));
    store
        .args(["--records", "150000", "--seconds", "6", "--socket"])
        .arg(broker.socket());
    store
}

/// It knows nothing of us.
fn sqlite_shell(broker: &Broker) -> Command {
    let mut shell = broker.run("sqlite3".as_ref());
    shell.args(["-batch", ":memory:", sqlite::SCRIPT]);
    shell
}

/// Prints what `program` says as it says it, until a line starts with `last`.
fn follow(program: &mut Background, seen: &mut usize, last: &str) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let ended = program.has_ended()?;
        let said = program.stdout_so_far();
        let complete = said.rfind('\n').map_or(0, |end| end + 1);
        for line in said[*seen..complete].lines() {
            println!("store: {line}");
        }
        let fresh = *seen;
        *seen = complete;
        if said[fresh..complete]
            .lines()
            .any(|line| line.starts_with(last))
        {
            return Ok(());
        }
        ensure!(!ended, "the store ended before it said {last:?}: {said}");
        ensure!(
            Instant::now() < deadline,
            "the store did not say {last:?} within {LIMIT:?}"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

fn release_half_of_free(broker: &Broker) -> Result<()> {
    let status = broker.order_json(&["status"])?;
    let block = broker::number(&status, "/device/block_size")?;
    let half = broker::number(&status, "/capacity/free")? / 2 / block * block;
    ensure!(half > 0, "nothing is free");
    println!("\n$ dcm release {}M", half >> 20);
    let accepted = broker::number(&status, "/capacity/accepted")?;
    println!("{}", broker.order(&["release", &half.to_string()])?);
    let left = broker.status_number("/capacity/accepted")?;
    ensure!(
        accepted - left >= half,
        "only {} of {half} bytes went back",
        accepted - left
    );
    Ok(())
}
