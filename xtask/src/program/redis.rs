//! redis-server under load, persistence off. It is linked against jemalloc and calls jemalloc's own names,
//! so it also shows that those answer for our heap.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::redis_server::Server;
use super::{OnExtents, same, without_digits};
use crate::process::{self, Finished};

const LIMIT: Duration = Duration::from_secs(60);

pub(super) fn judge() -> Result<()> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("load"), known_data())?;
    let server = Command::new("redis-server");
    let mut ours = OnExtents::new(&server)?;
    let (with, digest_with) = session(&mut ours.command, dir.path())?;
    let (without, digest_without) = session(&mut Command::new("redis-server"), dir.path())?;
    same("DEBUG DIGEST", &digest_with, &digest_without)?;
    ours.judge(&with, &without, normalise)
}

/// Starts the server, fills database 0 with what we know, runs the benchmark on database 1, and asks for
/// a digest of what is left.
fn session(server: &mut Command, dir: &Path) -> Result<(Finished, String)> {
    let server = Server::start(server, dir, LIMIT)?;
    server.feed("load")?;
    let mut benchmark = Command::new("redis-benchmark");
    benchmark.current_dir(dir).args([
        "-s",
        "redis.sock",
        "--dbnum",
        "1",
        "-P",
        "16",
        "-c",
        "20",
        "-d",
        "128",
        "-r",
        "50000",
        "-n",
        "150000",
        "-t",
        "set,get,lpush,hset,zadd,spop",
        "--csv",
    ]);
    let benchmark = process::run(&mut benchmark, LIMIT)?;
    ensure!(
        benchmark.success() && benchmark.stdout.contains("\"SET\""),
        "redis-benchmark: {} {} {}",
        benchmark.ending(),
        benchmark.stdout.trim(),
        benchmark.stderr.trim()
    );
    server.cli(&["-n", "1", "FLUSHDB"])?;
    let digest = server.digest()?;
    let keys = server.cli(&["DBSIZE"])?;
    ensure!(keys.trim() == "30000", "keys were lost: {}", keys.trim());
    Ok((server.end()?, digest))
}

/// 30,000 keys of all kinds and sizes, the same each time.
fn known_data() -> String {
    let mut commands = String::new();
    for i in 0..10_000 {
        let payload = "abcdefghij".repeat(1 + i % 60);
        // Writing into a String can't fail.
        let _ = write!(
            commands,
            "SET string:{i} {payload}{i}\r\nHSET hash:{i} a {i} b {payload} c x\r\n"
        );
        let _ = write!(commands, "RPUSH list:{i} {i} {payload} last\r\n");
    }
    commands
}

/// The log's lines start with `pid:role day month year time`.
fn normalise(log: &str) -> String {
    log.lines()
        .map(|line| {
            let stamped = line
                .split_once(':')
                .is_some_and(|(pid, _)| pid.parse::<u32>().is_ok());
            let message = if stamped {
                line.splitn(6, ' ').nth(5).unwrap_or(line)
            } else {
                line
            };
            without_digits(message) + "\n"
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_lose_their_stamp_only() {
        let a = "5319:M 22 Nov 2026 15:06:18.256 # Server initialized\n";
        let b = "77:M 23 Nov 2026 01:00:00.001 # Server initialized\n";
        assert_eq!(normalise(a), "# Server initialized\n");
        assert_eq!(normalise(a), normalise(b));
    }
}
