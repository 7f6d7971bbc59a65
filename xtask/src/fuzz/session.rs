//! One target, fuzzed for a while.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::tool;
use crate::process::{self, Background};
use crate::workspace;

/// How often it is told how far it is.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);
/// What starting and ending may take.
const SLACK: Duration = Duration::from_secs(120);
/// An input that takes longer hangs.
const HANGS_AFTER: &str = "-timeout=20";

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Session {
    /// What is wrong, and the input that shows it.
    pub(super) finding: Option<String>,
    pub(super) runs: u64,
    pub(super) seconds: u64,
    /// Edges of the program's flow that were taken, of those there are.
    pub(super) coverage: String,
    /// Inputs that each brought something new, and their bytes.
    pub(super) corpus: String,
}

impl Session {
    /// Builds `target`, and fuzzes it, from its seeds and what earlier sessions on this machine found worth keeping.
    pub(super) fn run(tool: &Path, target: &str, length: Duration) -> Result<Self> {
        let built = process::run_visibly(&mut tool::command(tool, "build", target))?;
        ensure!(built, "the target {target} does not build");
        let dir = workspace::target().join("fuzz");
        let (corpus, artifacts) = (
            dir.join("corpus").join(target),
            dir.join("artifacts").join(target),
        );
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&artifacts)?;
        let mut fuzz = tool::command(tool, "run", target);
        fuzz.arg(&corpus)
            .arg(workspace::root().join("fuzz/seeds").join(target))
            // Long inputs from the start: a slow target would not come to them.
            .args(["--", HANGS_AFTER, "-len_control=0", "-print_final_stats=1"])
            .arg(format!("-max_total_time={}", length.as_secs()))
            .arg(format!("-artifact_prefix={}/", artifacts.display()));
        let mut running = Background::start(&mut fuzz)?;
        let (start, limit) = (Instant::now(), length + SLACK);
        let mut next = SIGN_OF_LIFE;
        while !running.has_ended()? && start.elapsed() < limit {
            if start.elapsed() >= next {
                eprintln!("  {}", progress(&running.stderr_so_far()));
                next += SIGN_OF_LIFE;
            }
            thread::sleep(Duration::from_millis(50));
        }
        let finished = running.finish(limit.saturating_sub(start.elapsed()))?;
        let mut session = read(&finished.stderr);
        session.seconds = start.elapsed().as_secs();
        if !finished.success() && session.finding.is_none() {
            session.finding = Some(finished.ending());
        }
        if session.finding.is_some() {
            eprintln!("{}", finished.stderr);
        }
        Ok(session)
    }
}

/// The last line of libFuzzer's that says how far it is.
fn progress(said: &str) -> &str {
    let mut lines = said.lines().filter(|line| line.contains(" cov: "));
    lines.next_back().unwrap_or("starts").trim()
}

/// The word after `name` in a line of libFuzzer's.
fn after<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_once(name)?.1.split_whitespace().next()
}

/// Reads what libFuzzer says on stderr.
fn read(said: &str) -> Session {
    let last = progress(said);
    let counters = said
        .lines()
        .find(|line| line.starts_with("INFO: Loaded") && line.contains("inline 8-bit counters"))
        .and_then(|line| after(line, "("));
    let runs = said
        .lines()
        .find_map(|line| after(line, "stat::number_of_executed_units:"));
    Session {
        finding: finding(said),
        runs: runs.and_then(|runs| runs.parse().ok()).unwrap_or(0),
        seconds: 0,
        coverage: format!(
            "{} of {} edges",
            after(last, " cov: ").unwrap_or("?"),
            counters.unwrap_or("?")
        ),
        corpus: after(last, " corp: ")
            .unwrap_or("?")
            .replace('/', " inputs, "),
    }
}

/// The panic or the sanitizer's complaint, and where the input is.
fn finding(said: &str) -> Option<String> {
    let mut lines = said.lines();
    let mut found = None;
    while let Some(line) = lines.next() {
        if line.contains("panicked at") {
            let place = line.rsplit("panicked at ").next().unwrap_or(line);
            let why = lines.next().unwrap_or_default();
            found.get_or_insert(format!("{why} ({})", place.trim_end_matches(':')));
        } else if line.contains("ERROR: ") {
            found.get_or_insert(line.to_owned());
        } else if let Some((_, input)) = line.split_once("Test unit written to ") {
            let found = found.get_or_insert_default();
            let name = Path::new(input).file_name().unwrap_or_default();
            *found += &format!("; input {}", name.display());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: &str = "\
INFO: Running with entropic power schedule (0xFF, 100).
INFO: Loaded 1 modules   (52131 inline 8-bit counters): 52131 [0x1, 0x2),
#2\tINITED cov: 5 ft: 6 corp: 1/1b exec/s: 0 rss: 30Mb
#8192\tpulse  cov: 480 ft: 1201 corp: 77/812b lim: 80 exec/s: 4096 rss: 41Mb
Done 9000 runs in 121 second(s)
stat::number_of_executed_units: 9000
";

    #[test]
    fn what_libfuzzer_says_is_read() {
        let session = read(WELL);
        assert_eq!(session.finding, None);
        assert_eq!(session.runs, 9000);
        assert_eq!(session.coverage, "480 of 52131 edges");
        assert_eq!(session.corpus, "77 inputs, 812b");
    }

    #[test]
    fn a_finding_is_told_with_its_input() {
        let said = "thread '<unnamed>' (7) panicked at targets/config.rs:9:5:\nno such key\n\
                    ==7== ERROR: libFuzzer: deadly signal\n\
                    artifact_prefix='/x/'; Test unit written to /x/crash-12\n";
        assert_eq!(
            finding(said).unwrap(),
            "no such key (targets/config.rs:9:5); input crash-12"
        );
        let said = "==7==ERROR: AddressSanitizer: heap-use-after-free\n";
        assert!(finding(said).unwrap().contains("use-after-free"));
    }
}
