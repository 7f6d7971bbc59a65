//! redis-server on a socket of its own, persistence off.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::process::{self, Background, Finished};

/// A server that answers.
#[derive(Debug)]
pub(crate) struct Server<'a> {
    process: Background,
    dir: &'a Path,
    /// For one order.
    limit: Duration,
}

impl<'a> Server<'a> {
    /// Starts `server`, redis-server however it is to be run, with its socket in `dir`.
    pub(crate) fn start(server: &mut Command, dir: &'a Path, limit: Duration) -> Result<Self> {
        server.current_dir(dir).args(["--port", "0"]);
        server.args(["--unixsocket", "redis.sock", "--save", ""]);
        server.args(["--appendonly", "no", "--enable-debug-command", "local"]);
        let process = Background::start(server)?;
        let mut server = Self {
            process,
            dir,
            limit,
        };
        let end = Instant::now() + limit;
        while !server
            .cli(&["PING"])
            .is_ok_and(|pong| pong.trim() == "PONG")
        {
            ensure!(
                !server.process.has_ended()?,
                "the server ended at its start"
            );
            ensure!(Instant::now() < end, "the server does not answer");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    /// What redis-cli prints for `order`.
    pub(crate) fn cli(&self, order: &[&str]) -> Result<String> {
        let mut cli = Command::new("redis-cli");
        cli.current_dir(self.dir).args(["-s", "redis.sock"]);
        let finished = process::run(cli.args(order), self.limit)?;
        ensure!(
            finished.success(),
            "redis-cli {}: {} {}",
            order.join(" "),
            finished.ending(),
            finished.stderr.trim()
        );
        Ok(finished.stdout)
    }

    /// A client that gives the server the orders in `file`, all at once.
    pub(crate) fn feeder(&self, file: &str) -> Command {
        let mut feeder = Command::new("sh");
        feeder.current_dir(self.dir).arg("-c");
        feeder.arg(format!("redis-cli -s redis.sock --pipe < {file}"));
        feeder
    }

    /// Gives the server the orders in `file`, none of which may fail.
    pub(crate) fn feed(&self, file: &str) -> Result<()> {
        let fed = fed(&process::run(&mut self.feeder(file), self.limit)?);
        fed.with_context(|| format!("the server's last words: {}", self.last_words()))
    }

    /// The end of its log, and of what it says otherwise.
    fn last_words(&self) -> String {
        let log = self.process.stdout_so_far();
        let lines: Vec<&str> = log.lines().collect();
        let log = lines[lines.len().saturating_sub(4)..].join(" | ");
        format!("{log} | {}", self.process.stderr_tail())
    }

    /// Of all keys and what they hold.
    pub(crate) fn digest(&self) -> Result<String> {
        let digest = self.cli(&["DEBUG", "DIGEST"])?.trim().to_owned();
        ensure!(
            digest.len() == 40 && !digest.starts_with("0000000000"),
            "no digest but {digest:?}"
        );
        Ok(digest)
    }

    /// Shuts it down.
    pub(crate) fn end(self) -> Result<Finished> {
        // The server closes the connection instead of answering.
        self.cli(&["SHUTDOWN", "NOSAVE"])?;
        self.process.finish(self.limit)
    }

    /// The same; it succeeds and says nothing on stderr.
    pub(crate) fn end_well(self) -> Result<()> {
        let finished = self.end()?;
        ensure!(
            finished.success() && finished.stderr.is_empty(),
            "the server: {} {}",
            finished.ending(),
            finished.stderr.trim()
        );
        Ok(())
    }
}

/// Whether a feeder's orders all succeeded.
pub(crate) fn fed(finished: &Finished) -> Result<()> {
    ensure!(
        finished.success() && finished.stdout.contains("errors: 0"),
        "redis-cli --pipe: {} {} {}",
        finished.ending(),
        finished.stdout.trim(),
        finished.stderr.trim()
    );
    Ok(())
}
