//! `cargo test` over the workspace, counted test by test.

use std::time::Duration;

use anyhow::Result;

use super::Tally;
use crate::{process, workspace};

const LIMIT: Duration = Duration::from_secs(1800);

pub(super) fn run() -> Result<Tally> {
    let mut test = workspace::cargo();
    // Output of passing tests is shown, because a test that lacks something says SKIPPED there.
    test.args([
        "test",
        "--workspace",
        "--no-fail-fast",
        "--",
        "--show-output",
    ]);
    let finished = process::run(&mut test, LIMIT)?;
    let mut tally = count(&finished.stdout);
    if !finished.success() && tally.failed.is_empty() {
        tally.fail("cargo test", finished.ending());
    }
    if !tally.failed.is_empty() {
        eprintln!("{}\n{}", finished.stdout, finished.stderr);
    }
    Ok(tally)
}

/// Reads the harness's lines: `test NAME ... ok|FAILED|ignored`, and, in a passing test's own output,
/// `SKIPPED: reason` under the heading `---- NAME stdout ----`.
pub(crate) fn count(output: &str) -> Tally {
    let mut tally = Tally::default();
    let mut heading = "";
    let mut skipped: Vec<&str> = Vec::new();
    for line in output.lines() {
        if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            heading = name;
        } else if let Some(at) = line.find("SKIPPED")
            && !heading.is_empty()
        {
            let reason = line[at..]
                .trim_start_matches("SKIPPED")
                .trim_start_matches([':', ' ']);
            if skipped.last() != Some(&heading) {
                skipped.push(heading);
                tally.skip(heading, reason);
                // It was counted as passed above.
                tally.passed = tally.passed.saturating_sub(1);
            }
        } else if let Some((name, verdict)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.split_once(" ... "))
        {
            match verdict.split([',', ' ']).next() {
                Some("ok") => tally.pass(),
                Some("FAILED") => tally.fail(name, "see its output above"),
                Some("ignored") => tally.skip(
                    name,
                    verdict
                        .trim_start_matches("ignored")
                        .trim_start_matches([',', ' ']),
                ),
                _ => {}
            }
            heading = "";
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_is_counted() {
        let output = "\
running 4 tests
test a::one ... ok
test a::two ... FAILED
test a::three ... ignored, needs hardware
test a::four ... ok

successes:

---- a::four stdout ----
SKIPPED: no userfaultfd

failures:

---- a::two stdout ----
thread panicked

test result: FAILED. 2 passed; 1 failed; 1 ignored
";
        let tally = count(output);
        assert_eq!(tally.passed, 1);
        assert_eq!(tally.failed.len(), 1);
        assert_eq!(tally.failed[0].0, "a::two");
        let skipped: Vec<_> = tally
            .skipped
            .iter()
            .map(|(name, why)| (name.as_str(), why.as_str()))
            .collect();
        assert_eq!(
            skipped,
            [
                ("a::three", "needs hardware"),
                ("a::four", "no userfaultfd")
            ]
        );
    }
}
