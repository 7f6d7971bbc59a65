//! One run of a program in one of the three ways.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::Scale;
use super::recalls::{Recalls, Taker};
use crate::broker::{self, Broker};
use crate::process::{self, Finished};
use crate::workspace;

/// How a program is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Without us.
    Without,
    /// With its heap on extents.
    With,
    /// The same while extents come and go.
    Recalled,
}

/// How long the leases of processes that have ended may take to end.
const SETTLING: Duration = Duration::from_secs(20);

/// A directory to run in and, with us, a broker to run on.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) scale: Scale,
    dir: TempDir,
    with: Option<(Arc<Broker>, Option<Taker>)>,
}

/// What the broker says of all processes of a session.
#[derive(Debug, Clone)]
pub(crate) struct Account {
    /// Of all processes at the peaks of their heaps: bytes live, and the part of them on extents.
    pub(crate) live_peak: u64,
    pub(crate) live_peak_on_extents: u64,
    /// Of all that was in use over the lives of all processes, the part on extents, 0 to 1.
    pub(crate) share: f64,
    pub(crate) processes: u64,
    pub(crate) evacuated: u64,
    /// Bits that say what did not work.
    pub(crate) degraded: u64,
    pub(crate) recalls: Option<Recalls>,
}

impl Session {
    pub(super) fn start(way: Way, scale: Scale) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        // Some servers run as users of their own.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
        let with = match way {
            Way::Without => None,
            Way::With | Way::Recalled => {
                // The build may lie where they cannot read.
                fs::copy(workspace::preload(), dir.path().join("preload.so"))
                    .context("no preload library")?;
                fs::copy(workspace::dcm(), dir.path().join("dcm")).context("no dcm")?;
                let broker = Arc::new(Broker::serve_all("4G")?);
                let taker = (way == Way::Recalled).then(|| Taker::start(Arc::clone(&broker)));
                Some((broker, taker))
            }
        };
        Ok(Self { scale, dir, with })
    }

    /// A directory of this session's own, open to all users.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Another one, on the disk that the build is on: `/tmp` need not have direct I/O.
    pub(crate) fn scratch(&self) -> Result<TempDir> {
        let place = workspace::target().join("compat");
        fs::create_dir_all(&place)?;
        Ok(tempfile::tempdir_in(place)?)
    }

    /// `program` in this session's way, to be given its arguments.
    pub(crate) fn command(&self, program: impl AsRef<Path>) -> Command {
        let program: PathBuf = program.as_ref().into();
        let mut command = match &self.with {
            None => Command::new(program),
            Some((broker, _)) => {
                let mut command = broker.run(&program);
                command.env("DCM_PRELOAD", self.dir().join("preload.so"));
                command
            }
        };
        command.current_dir(self.dir());
        command
    }

    /// The same as another user. What changes the user comes first: it keeps its capabilities over that, which a
    /// process with threads of ours cannot (see `docs/limits.md`).
    pub(crate) fn command_as(&self, user: &str, program: impl AsRef<Path>) -> Command {
        let inner = self.command(program);
        let mut command = Command::new("setpriv");
        command
            .arg(format!("--reuid={user}"))
            .arg(format!("--regid={user}"))
            .args(["--init-groups", "--"]);
        match self.with {
            None => command.arg(inner.get_program()),
            Some(_) => command.arg(self.dir().join("dcm")),
        };
        command.args(inner.get_args()).current_dir(self.dir());
        for (name, value) in inner.get_envs() {
            if let Some(value) = value {
                command.env(name, value);
            }
        }
        command
    }

    /// Runs `command` to a successful end; what it wrote to stdout.
    pub(crate) fn succeed(&self, command: &mut Command, limit: Duration) -> Result<String> {
        let finished = process::run(command, limit)?;
        ensure!(finished.success(), "{}", explain(command, &finished));
        Ok(finished.stdout)
    }

    /// Ends the session; with us, what came of it.
    pub(super) fn end(self) -> Result<Option<Account>> {
        let Some((broker, taker)) = self.with else {
            return Ok(None);
        };
        let recalls = taker.map(Taker::stop).transpose()?;
        let end = Instant::now() + SETTLING;
        let status = loop {
            let status = broker.order_json(&["status"])?;
            if broker::number(&status, "/capacity/leased")? == 0 {
                break status;
            }
            ensure!(
                Instant::now() < end,
                "leases of processes that have ended: {}",
                left(&status)
            );
            thread::sleep(Duration::from_millis(50));
        };
        let number = |pointer| broker::number(&status, pointer);
        Ok(Some(Account {
            live_peak: number("/total/heap_live_peak")?,
            live_peak_on_extents: number("/total/heap_live_peak_on_extents")?,
            share: number("/total/heap_over_time_on_extents")? as f64
                / number("/total/heap_over_time")?.max(1) as f64,
            processes: number("/counters/clients")?,
            evacuated: number("/total/evacuated_granules")?,
            degraded: number("/total/degraded_flags")?,
            recalls,
        }))
    }
}

/// Who still holds what.
fn left(status: &Value) -> String {
    let clients = status["clients"].as_array().map_or(&[][..], Vec::as_slice);
    let holders: Vec<String> = clients
        .iter()
        .map(|client| {
            format!(
                "{} ({}) {} bytes",
                client["command"], client["pid"], client["leased"]
            )
        })
        .collect();
    holders.join(", ")
}

/// How a command ended, with the last of what it said.
pub(crate) fn explain(command: &Command, finished: &Finished) -> String {
    let tail = |text: &str| {
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(6)..].join(" | ")
    };
    let words: Vec<String> = command
        .get_args()
        .map(|arg| arg.to_string_lossy().into_owned())
        .collect();
    let mut words = words.join(" ");
    if let Some((cut, _)) = words.char_indices().nth(200) {
        words.truncate(cut);
    }
    format!(
        "{} {words}: {}; stdout: {}; stderr: {}",
        command.get_program().display(),
        finished.ending(),
        tail(&finished.stdout),
        tail(&finished.stderr)
    )
}
