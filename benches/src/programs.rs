//! The workload programs: where their sources are, what they print, and what we ask of ourselves.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What a program's `name value` line measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Better {
    /// Seconds, nanoseconds.
    Small,
    /// Operations per second.
    Large,
}

/// One program, and how it is judged.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Name of the program, and of its source under `benches/programs`.
    pub name: &'static str,
    /// Arguments of a full run.
    pub full: &'static [&'static str],
    /// Arguments of a short one, for a test run.
    pub short: &'static [&'static str],
    /// The result line that is compared.
    pub metric: &'static str,
    /// Which way is better.
    pub better: Better,
    /// Our cost over the other's that we stay within.
    pub limit: f64,
}

/// All that are compared, in the order of the report.
pub const WORKLOADS: &[Workload] = &[
    Workload {
        name: "pair",
        full: &["401"],
        short: &["51"],
        metric: "ns_per_pair",
        better: Better::Small,
        limit: 1.10,
    },
    Workload {
        name: "factor",
        full: &["3"],
        short: &["1"],
        metric: "seconds",
        better: Better::Small,
        limit: 1.05,
    },
    Workload {
        name: "server",
        full: &["10"],
        short: &["1"],
        metric: "ops_per_second",
        better: Better::Large,
        limit: 1.05,
    },
    Workload {
        name: "buildup",
        full: &["100"],
        short: &["20"],
        metric: "seconds",
        better: Better::Small,
        limit: 1.05,
    },
];

/// Peak memory over the other's that we stay within.
pub const MEMORY_LIMIT: f64 = 1.15;
/// Programs for which the other needs less are not judged by that ratio where they hold extents: those come
/// in granules of 2 MiB, and with one of them no such program can stay within it.
pub const MEMORY_JUDGED_FROM: f64 = 16.0 * 1024.0 * 1024.0;

impl Workload {
    /// Looks a workload up by name.
    pub fn named(name: &str) -> Result<&'static Workload> {
        WORKLOADS
            .iter()
            .find(|workload| workload.name == name)
            .with_context(|| {
                let known: Vec<_> = WORKLOADS.iter().map(|workload| workload.name).collect();
                format!("no workload {name}; there are {}", known.join(", "))
            })
    }

    /// The value of [`Workload::metric`] in what the program printed.
    pub fn value_in(&self, output: &str) -> Result<f64> {
        output
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(name, _)| *name == self.metric)
            .and_then(|(_, value)| value.trim().parse().ok())
            .with_context(|| format!("{} printed no {} line", self.name, self.metric))
    }
}

/// The directory of the sources.
fn source_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs")
}

/// Compiles `name` into `out_dir` and returns the program's path.
pub fn build(name: &str, out_dir: &Path) -> Result<PathBuf> {
    std::fs::create_dir_all(out_dir)
        .with_context(|| format!("can't create {}", out_dir.display()))?;
    let program = out_dir.join(name);
    let status = Command::new("cc")
        .args(["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"])
        .arg(source_dir().join(name).with_extension("c"))
        .arg("-o")
        .arg(&program)
        .status()
        .context("can't run cc")?;
    if !status.success() {
        bail!("cc failed on {name}.c: {status}");
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metric_is_the_whole_name() {
        let pair = Workload::named("pair").unwrap();
        assert_eq!(
            pair.value_in("ns_per_pair_16 7\nns_per_pair 8.5\n")
                .unwrap(),
            8.5
        );
        assert!(pair.value_in("ns_per_pair_16 7\n").is_err());
        assert!(Workload::named("unknown").is_err());
    }

    #[test]
    fn every_workload_has_its_source() {
        for workload in WORKLOADS {
            assert!(
                source_dir()
                    .join(workload.name)
                    .with_extension("c")
                    .is_file()
            );
        }
    }
}
