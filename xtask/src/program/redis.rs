//! redis-server under load, persistence off. It is linked against jemalloc and calls jemalloc's own names,
//! so it also shows that those answer for our heap.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::{OnExtents, same, without_digits};
use crate::process::{self, Background, Finished};

const LIMIT: Duration = Duration::from_secs(60);

pub(super) fn judge() -> Result<()> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("load"), known_data())?;
    let server = || {
        let mut server = Command::new("redis-server");
        server.current_dir(dir.path()).args([
            "--port",
            "0",
            "--unixsocket",
            "redis.sock",
            "--save",
            "",
            "--appendonly",
            "no",
            "--enable-debug-command",
            "local",
        ]);
        server
    };
    let mut ours = OnExtents::new(&server())?;
    let (with, digest_with) = session(&mut ours.command, dir.path())?;
    let (without, digest_without) = session(&mut server(), dir.path())?;
    same("DEBUG DIGEST", &digest_with, &digest_without)?;
    ours.judge(&with, &without, normalise)
}

/// Starts the server, fills database 0 with what we know, runs the benchmark on database 1, and asks for
/// a digest of what is left.
fn session(server: &mut Command, dir: &Path) -> Result<(Finished, String)> {
    let mut server = Background::start(server)?;
    let result = (|| {
        wait_until_ready(&mut server, dir)?;
        let mut load = Command::new("sh");
        load.current_dir(dir)
            .args(["-c", "redis-cli -s redis.sock --pipe < load"]);
        expect(process::run(&mut load, LIMIT)?, "errors: 0")?;
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
        expect(process::run(&mut benchmark, LIMIT)?, "\"SET\"")?;
        cli(dir, &["-n", "1", "FLUSHDB"])?;
        let digest = cli(dir, &["DEBUG", "DIGEST"])?;
        ensure!(
            digest.trim().len() == 40 && !digest.starts_with("0000000000"),
            "no digest but {digest:?}"
        );
        ensure!(cli(dir, &["DBSIZE"])?.trim() == "30000", "keys were lost");
        Ok(digest)
    })();
    // The server closes the connection instead of answering.
    let shut_down = cli(dir, &["SHUTDOWN", "NOSAVE"]);
    let finished = server.finish(Duration::from_secs(20))?;
    match result {
        Ok(digest) => {
            shut_down?;
            Ok((finished, digest))
        }
        Err(error) => {
            let log: Vec<&str> = finished.stdout.lines().rev().take(3).collect();
            Err(error.context(format!(
                "server: {}; {} {}",
                finished.ending(),
                log.join(" | "),
                finished.stderr.trim()
            )))
        }
    }
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

fn wait_until_ready(server: &mut Background, dir: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !cli(dir, &["PING"]).is_ok_and(|answer| answer.trim() == "PONG") {
        ensure!(!server.has_ended()?, "the server ended at its start");
        ensure!(
            Instant::now() < deadline,
            "the server did not answer within 20 s"
        );
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn cli(dir: &Path, args: &[&str]) -> Result<String> {
    let mut cli = Command::new("redis-cli");
    cli.current_dir(dir).args(["-s", "redis.sock"]).args(args);
    let finished = process::run(&mut cli, LIMIT)?;
    if !finished.success() {
        bail!(
            "redis-cli {}: {} {}",
            args.join(" "),
            finished.ending(),
            finished.stderr.trim()
        );
    }
    Ok(finished.stdout)
}

fn expect(finished: Finished, text: &str) -> Result<()> {
    ensure!(
        finished.success() && finished.stdout.contains(text),
        "{}, without {text:?}: {} {}",
        finished.ending(),
        finished.stdout.trim(),
        finished.stderr.trim()
    );
    Ok(())
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
