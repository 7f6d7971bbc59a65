//! Tests of the allocator, alone and at a length that the ladder has no time for.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::process::{self, Background};
use crate::rung::unit;
use crate::workspace;

/// How often it is told that a test is still at work.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);
/// What a test may take beside what it is told to take.
const SLACK: Duration = Duration::from_secs(300);

/// One file of `allocator/tests`.
#[derive(Debug)]
pub(super) struct TestFile {
    pub(super) name: &'static str,
    /// Cargo's profile: `test`, or `release` for what is measured.
    pub(super) profile: &'static str,
    /// Whether its tests are measurements, which are ignored otherwise.
    pub(super) ignored: bool,
    /// The variable that it takes its length from, and seconds.
    pub(super) length: Option<(&'static str, u64)>,
}

impl TestFile {
    /// Builds it and runs its tests one after the other; `notes` gets what they print.
    pub(super) fn run(&self, notes: &mut Vec<String>) -> Result<()> {
        let mut build = self.cargo();
        ensure!(
            process::run_visibly(build.args(["--quiet", "--no-run"]))?,
            "{} does not build",
            self.name
        );
        let mut test = self.cargo();
        test.args(["--", "--test-threads=1", "--show-output"]);
        if self.ignored {
            test.arg("--ignored");
        }
        let mut limit = SLACK;
        if let Some((variable, seconds)) = self.length {
            test.env(variable, seconds.to_string());
            limit += Duration::from_secs(2 * seconds);
        }
        let mut running = Background::start(&mut test)?;
        let start = Instant::now();
        let mut next = SIGN_OF_LIFE;
        while !running.has_ended()? && start.elapsed() < limit {
            if start.elapsed() >= next {
                eprintln!("  {:.0} s …", start.elapsed().as_secs_f64());
                next += SIGN_OF_LIFE;
            }
            thread::sleep(Duration::from_millis(50));
        }
        let finished = running.finish(limit.saturating_sub(start.elapsed()))?;
        notes.extend(printed(&finished.stdout));
        let tally = unit::count(&finished.stdout);
        if !finished.success() || !tally.failed.is_empty() {
            bail!("{}: {}", finished.ending(), complaint(&finished.stdout));
        }
        if let Some((test, reason)) = tally.skipped.first() {
            bail!("{test} can't be judged here: {reason}");
        }
        ensure!(tally.passed > 0, "no test ran");
        Ok(())
    }

    fn cargo(&self) -> std::process::Command {
        let mut cargo = workspace::cargo();
        // Not quiet: then the harness does not say what became of each test.
        cargo.args(["test", "--package", "dcmalloc-allocator"]);
        cargo.args(["--profile", self.profile, "--test", self.name]);
        cargo
    }
}

/// What each test printed: the harness shows it below `---- NAME stdout ----`, up to an empty line.
fn printed(output: &str) -> Vec<String> {
    let mut notes: Vec<String> = Vec::new();
    let mut inside = false;
    for line in output.lines() {
        if let Some(heading) = line.strip_prefix("---- ") {
            let name = heading.split(' ').next().unwrap_or_default();
            notes.push(format!("{name}:"));
            inside = true;
        } else if line.is_empty() || line.starts_with("thread '") {
            // A panic is told as the failure that it is.
            inside = false;
        } else if inside && let Some(note) = notes.last_mut() {
            let between = if note.ends_with(':') { " " } else { ", " };
            *note += between;
            *note += &line.split_whitespace().collect::<Vec<_>>().join(" ");
        }
    }
    notes
}

/// What a failed test says: the line below each panic's head.
fn complaint(output: &str) -> String {
    let mut lines = output.lines();
    let mut said = Vec::new();
    while let Some(line) = lines.next() {
        if line.starts_with("thread '") && line.contains("panicked at") {
            said.extend(lines.next());
        }
    }
    said.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
running 2 tests
..
successes:

---- storm stdout ----
7 recalls
  9 increments

---- measured stdout ----
1.5 GB/s

thread 'measured' (12) panicked at tests/x.rs:3:5:
too slow
note: run with RUST_BACKTRACE=1

successes:
    storm
";

    #[test]
    fn what_tests_print_is_collected() {
        assert_eq!(
            printed(OUTPUT),
            ["storm: 7 recalls, 9 increments", "measured: 1.5 GB/s"].map(String::from)
        );
        assert_eq!(complaint(OUTPUT), "too slow");
        assert_eq!(printed("test a ... ok\n"), Vec::<String>::new());
    }
}
