//! Who runs a program: dcmalloc under `dcm run`, another allocator's library, or the C library alone.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::NamedTempFile;

use crate::peak::DramSampler;
use crate::programs::Workload;

/// One allocator, ready to run programs.
#[derive(Debug, Clone)]
pub enum Contender {
    /// dcmalloc on a software device.
    Dcmalloc {
        /// The `dcm` binary.
        dcm: PathBuf,
        /// `--placement`.
        placement: String,
        /// `--emulate`.
        device_size: String,
    },
    /// A library for LD_PRELOAD.
    Preload {
        /// What to call it.
        name: String,
        /// The library.
        library: PathBuf,
    },
    /// What the program is linked with.
    System,
}

/// What one run gave.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// The workload's metric.
    pub value: f64,
    /// Peak of DRAM, plus the peak of extents held.
    pub peak_bytes: u64,
    /// The part of `peak_bytes` that is extents.
    pub extent_peak_bytes: u64,
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Contender::Dcmalloc { placement, .. } => write!(f, "dcmalloc {placement}"),
            Contender::Preload { name, .. } => f.write_str(name),
            Contender::System => f.write_str("system"),
        }
    }
}

impl Contender {
    /// `program` under this allocator; dcmalloc's statistics go to `stats`.
    fn command(&self, program: &Path, stats: &Path) -> Command {
        match self {
            Contender::Dcmalloc {
                dcm,
                placement,
                device_size,
            } => {
                let mut command = Command::new(dcm);
                command
                    .args(["run", "--emulate", device_size, "--placement", placement])
                    .args(["--stats", "json", "--stats-file"])
                    .arg(stats)
                    .arg("--")
                    .arg(program);
                command
            }
            Contender::Preload { library, .. } => {
                let mut command = Command::new(program);
                command.env("LD_PRELOAD", library);
                command
            }
            Contender::System => Command::new(program),
        }
    }

    /// Runs `program` once.
    pub fn run(&self, workload: &Workload, program: &Path, args: &[&str]) -> Result<Sample> {
        let stats = NamedTempFile::new()?;
        let mut child = self
            .command(program, stats.path())
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("can't start {} under {self}", workload.name))?;
        let sampler = DramSampler::start(child.id(), program);
        // stderr is a few lines at the end, so reading one after the other cannot block the program.
        let (mut stdout, mut stderr) = (String::new(), String::new());
        child
            .stdout
            .take()
            .context("no stdout")?
            .read_to_string(&mut stdout)?;
        child
            .stderr
            .take()
            .context("no stderr")?
            .read_to_string(&mut stderr)?;
        let status = child.wait()?;
        let dram_peak = sampler.finish();
        if !status.success() {
            bail!("{} under {self}: {status}\n{stderr}", workload.name);
        }
        let extent_peak_bytes = match self {
            Contender::Dcmalloc { .. } => extent_peak(&std::fs::read_to_string(stats.path())?)?,
            _ => 0,
        };
        Ok(Sample {
            value: workload.value_in(&stdout)?,
            peak_bytes: dram_peak + extent_peak_bytes,
            extent_peak_bytes,
        })
    }
}

/// The most that the program held on extents, from the statistics of `dcm run`.
fn extent_peak(stats: &str) -> Result<u64> {
    let stats: Value = serde_json::from_str(stats).context("dcm run left no statistics")?;
    stats
        .pointer("/total/extent_held_peak")
        .and_then(Value::as_u64)
        .context("the statistics have no total/extent_held_peak")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_count_by_what_is_held() {
        assert_eq!(
            extent_peak(r#"{"total": {"extent_held_peak": 4194304}}"#).unwrap(),
            4 << 20
        );
        assert!(extent_peak("").is_err());
        assert!(extent_peak(r#"{"total": {}}"#).is_err());
    }

    #[test]
    fn the_system_allocator_runs_a_program() {
        let dir = tempfile::tempdir().unwrap();
        let program = crate::programs::build("pair", dir.path()).unwrap();
        let pair = Workload::named("pair").unwrap();
        let sample = Contender::System.run(pair, &program, &["11"]).unwrap();
        assert!(sample.value > 0.0);
        assert_eq!(sample.extent_peak_bytes, 0);
    }
}
