//! A broker of its own, over a software device or a CXL device, for as long as the value lives.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::process::{self, Background};
use crate::workspace;

const LIMIT: Duration = Duration::from_secs(20);

/// `dcm serve` in the background.
#[derive(Debug)]
pub(crate) struct Broker {
    // Ended before its directory goes.
    process: Background,
    dir: TempDir,
    /// For one order.
    limit: Duration,
}

impl Broker {
    /// Serves a software device of 1 GiB of which `offer` is added at once, as one group.
    pub(crate) fn serve(offer: &str) -> Result<Self> {
        Self::over(&["--emulate", "1G", "--offer", offer], LIMIT)
    }

    /// Serves a software device of `size`, all of which is added at once.
    pub(crate) fn serve_all(size: &str) -> Result<Self> {
        Self::over(&["--emulate", size, "--offer", size], LIMIT)
    }

    /// Serves what `source`, options of `dcm serve`, names. It starts, and follows an order, within `limit`.
    pub(crate) fn over(source: &[&str], limit: Duration) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // Programs of other users connect, too.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
        let mut serve = Command::new(workspace::dcm());
        serve.arg("serve").args(source).arg("--socket");
        let mut process = Background::start(serve.arg(dir.path().join("broker.sock")))?;
        if let Err(error) = process.wait_for("serving", limit) {
            let finished = process.finish(Duration::ZERO)?;
            bail!("dcm serve: {error:#}: {}", finished.stderr.trim());
        }
        Ok(Self {
            process,
            dir,
            limit,
        })
    }

    /// The process that was started: the keeper.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Has it end as an operator would, or as `kill -9` does.
    pub(crate) fn end(self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.process.id().cast_signed()).context("no process")?;
        kill_process(pid, signal)?;
        self.process.finish(self.limit)?;
        Ok(())
    }

    /// Where it listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("broker.sock")
    }

    /// `program` under `dcm run` on this broker, with everything on extents.
    pub(crate) fn run(&self, program: &Path) -> Command {
        self.run_with(&[], program)
    }

    /// The same with further options of `dcm run`.
    pub(crate) fn run_with(&self, options: &[&str], program: &Path) -> Command {
        let mut run = Command::new(workspace::dcm());
        run.args(["run", "--placement", "dc"]).args(options);
        run.arg("--socket").arg(self.socket());
        run.arg("--").arg(program);
        run
    }

    /// An order of `dcm`, such as `["add", "64M"]`; what it prints.
    pub(crate) fn order(&self, order: &[&str]) -> Result<String> {
        let mut dcm = Command::new(workspace::dcm());
        dcm.args(order).arg("--socket").arg(self.socket());
        let finished = process::run(&mut dcm, self.limit)?;
        if !finished.success() {
            bail!(
                "dcm {}: {}: {}",
                order.join(" "),
                finished.ending(),
                finished.stderr.trim()
            );
        }
        Ok(finished.stdout)
    }

    /// The same with `--json`.
    pub(crate) fn order_json(&self, order: &[&str]) -> Result<Value> {
        let text = self.order(&[order, &["--json"]].concat())?;
        serde_json::from_str(&text)
            .with_context(|| format!("dcm {} printed no JSON", order.join(" ")))
    }

    /// A number of `dcm status --json`, such as `/capacity/leased`.
    pub(crate) fn status_number(&self, pointer: &str) -> Result<u64> {
        number(&self.order_json(&["status"])?, pointer)
    }
}

/// The number at `pointer`.
pub(crate) fn number(value: &Value, pointer: &str) -> Result<u64> {
    value
        .pointer(pointer)
        .and_then(Value::as_u64)
        .with_context(|| format!("dcm printed no {pointer}"))
}
