//! CPython's own tests with every object malloc'd.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use super::{same_either_way, without_digits};

pub(super) fn judge() -> Result<()> {
    let mut python = Command::new("/usr/bin/python3.11");
    python
        .env("PYTHONMALLOC", "malloc")
        // Hash order shows in no output, but it decides how long things take.
        .env("PYTHONHASHSEED", "0")
        .args(["-m", "test", "test_json", "test_dict", "test_list"]);
    same_either_way(&mut python, Duration::from_secs(180), normalise)
}

/// regrtest's progress lines start with a clock and the load average.
fn normalise(text: &str) -> String {
    text.lines()
        .map(|line| {
            if line.contains("load avg") || line.starts_with("Total duration") {
                let rest = line.split_once("load avg: ").map_or(line, |(_, rest)| rest);
                without_digits(rest) + "\n"
            } else {
                line.to_owned() + "\n"
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_times_are_dropped() {
        let a =
            "0:00:00 load avg: 0.69 [1/3] test_json\nTotal duration: 2.3 sec\nAll 3 tests OK.\n";
        let b =
            "0:01:10 load avg: 10.2 [1/3] test_json\nTotal duration: 12.9 sec\nAll 3 tests OK.\n";
        assert_eq!(normalise(a), normalise(b));
        assert_ne!(normalise(a), normalise(&b.replace("All 3", "All 2")));
    }
}
