//! Medians, ratios, the table for people and the rows for machines.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::contender::Sample;
use crate::programs::{Better, MEMORY_JUDGED_FROM, MEMORY_LIMIT, Workload};

/// The median; of an even number, the mean of the middle two.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// Ours against the other's, on one workload.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Name of the workload.
    pub workload: &'static str,
    /// Ours, by name.
    pub ours: String,
    /// The other's name.
    pub other: String,
    /// Our median, in the workload's metric.
    pub our_median: f64,
    /// The other's.
    pub other_median: f64,
    /// Our cost over the other's: below 1 is better, whichever way the metric counts.
    pub cost_ratio: f64,
    /// The limit on it.
    pub cost_limit: f64,
    /// Median of our peaks, in bytes.
    pub our_peak: f64,
    /// The other's.
    pub other_peak: f64,
    /// Ours were on extents, which come by the granule.
    pub holds_granules: bool,
}

impl Comparison {
    /// Compares the samples of one workload.
    pub fn of(workload: &Workload, ours: (&str, &[Sample]), other: (&str, &[Sample])) -> Self {
        let value = |samples: &[Sample]| median(samples.iter().map(|sample| sample.value));
        let peak =
            |samples: &[Sample]| median(samples.iter().map(|sample| sample.peak_bytes as f64));
        let (our_median, other_median) = (value(ours.1), value(other.1));
        Self {
            workload: workload.name,
            ours: ours.0.to_owned(),
            other: other.0.to_owned(),
            our_median,
            other_median,
            cost_ratio: match workload.better {
                Better::Small => our_median / other_median,
                Better::Large => other_median / our_median,
            },
            cost_limit: workload.limit,
            our_peak: peak(ours.1),
            other_peak: peak(other.1),
            holds_granules: ours.1.iter().any(|sample| sample.extent_peak_bytes > 0),
        }
    }

    /// Our peak memory over the other's.
    pub fn memory_ratio(&self) -> f64 {
        self.our_peak / self.other_peak
    }

    /// Whether both ratios are within `slack` times their limits. NaN is not.
    pub fn holds(&self, slack: f64) -> bool {
        let memory = !self.memory_is_judged() || self.memory_ratio() <= MEMORY_LIMIT * slack;
        self.cost_ratio <= self.cost_limit * slack && memory
    }

    /// See [`MEMORY_JUDGED_FROM`].
    fn memory_is_judged(&self) -> bool {
        self.other_peak >= MEMORY_JUDGED_FROM || !self.holds_granules
    }
}

/// Prints the comparisons as a table.
pub fn print_table(comparisons: &[Comparison], slack: f64) {
    println!(
        "{:<9} {:<22} {:>12} {:>12} {:>7} {:>6}  {:>10} {:>10} {:>7} {:>6}",
        "workload", "ours", "ours", "other", "cost", "limit", "ours", "other", "memory", "limit"
    );
    for c in comparisons {
        println!(
            "{:<9} {:<22} {:>12} {:>12} {:>7.3} {:>6.2}  {:>6.1} MiB {:>6.1} MiB {:>7.3} {:>6}  {}",
            c.workload,
            c.ours,
            four_digits(c.our_median),
            four_digits(c.other_median),
            c.cost_ratio,
            c.cost_limit * slack,
            c.our_peak / f64::from(1 << 20),
            c.other_peak / f64::from(1 << 20),
            c.memory_ratio(),
            if c.memory_is_judged() {
                format!("{:.2}", MEMORY_LIMIT * slack)
            } else {
                "-".to_owned()
            },
            if c.holds(slack) { "ok" } else { "OVER" }
        );
    }
}

/// As many decimals as four digits leave room for.
fn four_digits(value: f64) -> String {
    let before_the_point = value.abs().max(1.0).log10() as usize + 1;
    format!("{value:.*}", 4_usize.saturating_sub(before_the_point))
}

/// One contender's samples of one workload: a line of NDJSON.
#[derive(Debug, Serialize)]
pub struct Row<'a> {
    /// Name of the workload.
    pub bench: &'a str,
    /// Its arguments.
    pub args: &'a [&'a str],
    /// What is measured.
    pub metric: &'a str,
    /// The contender.
    pub allocator: &'a str,
    /// Revision of this repository; `+` when the tree had changes.
    pub git_revision: &'a str,
    /// Seconds since the epoch.
    pub unix_time: u64,
    /// CPUs of the machine.
    pub cpus: usize,
    /// The metric, round by round.
    pub samples: Vec<f64>,
    /// Peak bytes, round by round.
    pub peak_bytes: Vec<u64>,
    /// The part of them on extents.
    pub extent_peak_bytes: Vec<u64>,
}

impl<'a> Row<'a> {
    /// The row of `samples`, as of now.
    pub fn new(
        workload: &'a Workload,
        args: &'a [&'a str],
        allocator: &'a str,
        git_revision: &'a str,
        samples: &[Sample],
    ) -> Self {
        Self {
            bench: workload.name,
            args,
            metric: workload.metric,
            allocator,
            git_revision,
            unix_time: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |elapsed| elapsed.as_secs()),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            samples: samples.iter().map(|sample| sample.value).collect(),
            peak_bytes: samples.iter().map(|sample| sample.peak_bytes).collect(),
            extent_peak_bytes: samples.iter().map(|s| s.extent_peak_bytes).collect(),
        }
    }

    /// Appends the row to `file`.
    pub fn append_to(&self, file: &Path) -> Result<()> {
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let mut out = OpenOptions::new()
            .create(true)
            .append(true)
            .open(file)
            .with_context(|| format!("can't append to {}", file.display()))?;
        writeln!(out, "{}", serde_json::to_string(self)?)?;
        Ok(())
    }
}

/// The revision that is measured.
pub fn git_revision() -> String {
    let git = |args: &[&str]| {
        Command::new("git")
            .args(args)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .ok()
            .filter(|output| output.status.success())
            .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(revision) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".to_owned();
    };
    match git(&["status", "--porcelain", "--untracked-files=no"]) {
        Some(changes) if changes.is_empty() => revision,
        _ => revision + "+",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Vec<Sample> {
        values
            .iter()
            .map(|value| Sample {
                value: *value,
                peak_bytes: 100 << 20,
                extent_peak_bytes: 0,
            })
            .collect()
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(four_digits(11_296_000.0), "11296000");
        assert_eq!(four_digits(5.93053), "5.931");
        assert_eq!(four_digits(0.08109), "0.081");
    }

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median([]).is_nan());
    }

    #[test]
    fn memory_is_judged_where_a_granule_is_little() {
        let pair = Workload::named("pair").unwrap();
        let with_peak = |mib: u64| {
            let mut samples = samples(&[1.0]);
            samples[0].peak_bytes = mib << 20;
            samples
        };
        let holds = |ours, extents: u64, other| {
            let mut ours = with_peak(ours);
            ours[0].extent_peak_bytes = extents << 20;
            Comparison::of(pair, ("a", &ours), ("b", &with_peak(other))).holds(1.0)
        };
        assert!(holds(114, 90, 100) && !holds(116, 90, 100));
        assert!(holds(9, 2, 4) && !holds(40, 20, 20));
        assert!(holds(9, 0, 8) && !holds(9, 0, 4));
    }

    #[test]
    fn cost_counts_the_same_way_for_both_metrics() {
        let (slow, fast) = (samples(&[2.0]), samples(&[1.0]));
        let factor = Workload::named("factor").unwrap();
        let server = Workload::named("server").unwrap();
        assert_eq!(
            Comparison::of(factor, ("a", &slow), ("b", &fast)).cost_ratio,
            2.0
        );
        assert_eq!(
            Comparison::of(server, ("a", &fast), ("b", &slow)).cost_ratio,
            2.0
        );
        assert!(!Comparison::of(factor, ("a", &slow), ("b", &fast)).holds(1.0));
        assert!(Comparison::of(factor, ("a", &fast), ("b", &slow)).holds(1.0));
        assert!(!Comparison::of(factor, ("a", &[]), ("b", &slow)).holds(1.0));
    }
}
