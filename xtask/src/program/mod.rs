//! Real programs that run twice, without us and with their heap on extents, and must say the same.

mod gcc;
mod python;
mod redis;
pub(crate) mod redis_server;
pub(crate) mod sqlite;

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use tempfile::NamedTempFile;

use crate::process::{self, Finished};
use crate::stats::RunStats;
use crate::workspace;

/// What Debian calls the programs and their tests.
pub(crate) const PACKAGES: &[&str] = &[
    "gcc",
    "libc6-dev",
    "libpython3.11-testsuite",
    "python3.11",
    "redis-server",
    "redis-tools",
    "sqlite3",
];

/// Runs one program both ways and compares.
pub(crate) type Judge = fn() -> Result<()>;

/// Each program with its judge.
pub(crate) const ALL: &[(&str, Judge)] = &[
    ("python", python::judge),
    ("sqlite", sqlite::judge),
    ("redis", redis::judge),
    ("gcc", gcc::judge),
];

/// Least share of the heap, at its peak, that must lie on extents.
const LEAST_SHARE: f64 = 0.90;

/// A program under `dcm run`, with its heap on the extents of a software device.
struct OnExtents {
    command: Command,
    stats: NamedTempFile,
}

impl OnExtents {
    fn new(program: &Command) -> Result<Self> {
        let stats = NamedTempFile::new()?;
        let mut command = Command::new(workspace::dcm());
        command.args([
            "run",
            "--emulate",
            "1G",
            "--placement",
            "dc",
            "--stats",
            "json",
            "--stats-file",
        ]);
        command.arg(stats.path()).arg("--");
        command.arg(program.get_program()).args(program.get_args());
        for (name, value) in program.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        if let Some(dir) = program.get_current_dir() {
            command.current_dir(dir);
        }
        Ok(Self { command, stats })
    }

    /// Judges a finished run by one without us: the same ending, stdout and stderr after `normalise`,
    /// and a heap that was where it should be.
    fn judge(
        &self,
        with: &Finished,
        without: &Finished,
        normalise: fn(&str) -> String,
    ) -> Result<()> {
        if with.ending() != without.ending() {
            bail!(
                "{} instead of {}: {}",
                with.ending(),
                without.ending(),
                explain(with)
            );
        }
        same(
            "stdout",
            &normalise(&with.stdout),
            &normalise(&without.stdout),
        )?;
        same(
            "stderr",
            &normalise(&with.stderr),
            &normalise(&without.stderr),
        )?;
        mostly_on_extents(&RunStats::read(self.stats.path())?)
    }
}

/// Runs `program` both ways and compares.
fn same_either_way(
    program: &mut Command,
    limit: Duration,
    normalise: fn(&str) -> String,
) -> Result<()> {
    let mut ours = OnExtents::new(program)?;
    let with = process::run(&mut ours.command, limit)?;
    let without = process::run(program, limit)?;
    ensure!(without.success(), "fails without us: {}", explain(&without));
    ours.judge(&with, &without, normalise)
}

/// A program that barely used the heap would prove nothing, nor would one whose heap was elsewhere.
fn mostly_on_extents(stats: &RunStats) -> Result<()> {
    let share = stats.share_on_extents();
    eprintln!(
        "  {:.1} MiB live at the peak of {} processes, {:.1} % of it on extents",
        stats.live_peak as f64 / f64::from(1 << 20),
        stats.processes,
        share * 100.0
    );
    ensure!(
        stats.live_peak >= 1 << 20,
        "the heap's peak was only {} bytes",
        stats.live_peak
    );
    ensure!(
        share >= LEAST_SHARE,
        "only {:.1} % of the heap was on extents",
        share * 100.0
    );
    Ok(())
}

fn same(what: &str, with: &str, without: &str) -> Result<()> {
    if with == without {
        return Ok(());
    }
    for (ours, theirs) in with.lines().zip(without.lines()) {
        ensure!(
            ours == theirs,
            "{what} differs: {ours:?} instead of {theirs:?}"
        );
    }
    bail!(
        "{what} has {} lines instead of {}",
        with.lines().count(),
        without.lines().count()
    );
}

fn explain(finished: &Finished) -> String {
    let tail = |text: &str| {
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(4)..].join(" | ")
    };
    format!(
        "{}; stdout: {}; stderr: {}",
        finished.ending(),
        tail(&finished.stdout),
        tail(&finished.stderr)
    )
}

/// For output without times or process ids.
fn verbatim(text: &str) -> String {
    text.to_owned()
}

/// Every run of digits as one `#`, for lines that carry times.
fn without_digits(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    for c in line.chars() {
        if !c.is_ascii_digit() {
            out.push(c);
        } else if !out.ends_with('#') {
            out.push('#');
        }
    }
    out
}
