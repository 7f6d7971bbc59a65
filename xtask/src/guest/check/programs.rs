//! Programs that lose their extents while they work on them, and say what they say without us.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::super::inside::Guest;
use super::served::{self, LIMIT, MIB, Served, mib};
use crate::process::{self, Background};
use crate::program::redis_server::{self, Server};

/// A database that is made, changed, and read until there is a file `stop`, and then checked.
const DATABASE: &str = "\
CREATE TABLE record(id INTEGER PRIMARY KEY, name TEXT NOT NULL, payload TEXT NOT NULL, score INTEGER NOT NULL);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 12000)
INSERT INTO record
SELECT i, printf('name-%08d', i * 7919 % 200003), printf('%0*d', 100 + i % 160, i), i * 31 % 1000 FROM n;
CREATE INDEX record_name ON record(name);
SELECT writefile('loaded', 'x');
UPDATE record SET payload = payload || '-changed' WHERE score < 300;
DELETE FROM record WHERE id % 7 = 3;
WITH RECURSIVE turn(i) AS (
    SELECT 1 UNION ALL
    SELECT i + 1 FROM turn
    WHERE readfile('stop') IS NULL
    AND (SELECT sum(length(payload)) FROM record WHERE id BETWEEN i * 100 % 12000 AND i * 100 % 12000 + 99) > 0
) SELECT max(i) > 0 FROM turn;
PRAGMA integrity_check;
SELECT count(*), sum(length(payload)), sum(score), min(name), max(name) FROM record;
SELECT score, count(*), sum(id) FROM record GROUP BY score HAVING score % 100 = 0;
";

/// SQLite's shell with a database of a few MiB.
pub(super) fn sqlite(guest: &Guest) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let stop = dir.path().join("stop");
    let script = ["-batch", ":memory:", DATABASE];
    fs::write(&stop, "")?;
    let mut bare = Command::new("sqlite3");
    let bare = process::run(bare.current_dir(dir.path()).args(script), LIMIT)?;
    ensure!(
        bare.success() && bare.stdout.contains("\nok\n"),
        "without us: {} {} {}",
        bare.ending(),
        bare.stdout.trim(),
        bare.stderr.trim()
    );
    fs::remove_file(&stop)?;
    fs::remove_file(dir.path().join("loaded"))?;

    let halves = [mib(0, 6), mib(16, 6)];
    let served = Served::with(guest, &halves)?;
    let mut shell = served.run("sqlite3");
    let mut shell = Background::start(shell.current_dir(dir.path()).args(script))?;
    wait_for_file(&mut shell, &dir.path().join("loaded"))?;
    let start = Instant::now();
    let mut moved = 0;
    for half in halves {
        moved += served::moved(&served.lose(guest, &[half])?)?;
    }
    guest.note(format!(
        "12 MiB asked back in two goes were gone after {} ms, {} MiB moved in use",
        start.elapsed().as_millis(),
        moved / MIB
    ));
    ensure!(!shell.has_ended()?, "it ended before it was told to");
    served.has_moved()?;
    fs::write(&stop, "")?;
    let finished = shell.finish(LIMIT)?;
    ensure!(
        finished.success() && finished.stdout == bare.stdout && finished.stderr == bare.stderr,
        "{}, or another result: {} {}",
        finished.ending(),
        finished.stdout.trim(),
        finished.stderr.trim()
    );
    served.leave()
}

fn wait_for_file(program: &mut Background, path: &Path) -> Result<()> {
    let start = Instant::now();
    while !path.exists() {
        ensure!(!program.has_ended()?, "the program ended too early");
        ensure!(start.elapsed() < LIMIT, "no {} appears", path.display());
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

const KEYS: usize = 1500;

/// A redis server with 7 MiB of keys on 12 MiB of extents; half of these are asked back while a client
/// changes and reads all keys.
pub(super) fn redis(guest: &Guest) -> Result<()> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("load"), load())?;
    fs::write(dir.path().join("changes"), changes())?;
    let digest = {
        let bare = Server::start(&mut Command::new("redis-server"), dir.path(), LIMIT)?;
        bare.feed("load").context("bare load")?;
        bare.feed("changes").context("bare changes")?;
        let digest = bare.digest()?;
        bare.end_well()?;
        digest
    };
    let halves = [mib(0, 6), mib(16, 6)];
    let served = Served::with(guest, &halves)?;
    let mut command = served.run("redis-server");
    // So that it says why it closes a connection.
    let server = Server::start(command.args(["--loglevel", "verbose"]), dir.path(), LIMIT)?;
    server.feed("load").context("load")?;
    let live = served.number("/clients/0/stats/extent_live_bytes")?;
    ensure!(live > 6 * MIB, "only {live} bytes are on extents");

    let mut client = Background::start(&mut server.feeder("changes"))?;
    let start = Instant::now();
    let moved = served::moved(&served.lose(guest, &halves[..1])?)?;
    guest.note(format!(
        "half of 12 MiB was gone {} ms after it was asked for, {} MiB of it moved in use; the client was {}",
        start.elapsed().as_millis(),
        moved / MIB,
        if client.has_ended()? { "done by then" } else { "at work all the time" }
    ));
    served.has_moved()?;
    redis_server::fed(&client.finish(LIMIT)?)?;
    let now = server.digest()?;
    ensure!(now == digest, "digest {now}, without us {digest}");
    server.end_well()?;
    served.leave()
}

fn load() -> String {
    let mut orders = String::new();
    for key in 0..KEYS {
        let value = format!("{key:08}").repeat(560);
        // Writing into a String can't fail.
        let _ = write!(orders, "SET key:{key} {value}\r\n");
    }
    orders
}

/// Each key is changed in place, read and counted, twice.
fn changes() -> String {
    let mut orders = String::new();
    for i in 0..2 * KEYS {
        let key = i * 7 % KEYS;
        let _ = write!(
            orders,
            "SETRANGE key:{key} {} turn-{i:06}\r\nGET key:{key}\r\nINCR turns\r\n",
            i % 4000
        );
    }
    orders
}
