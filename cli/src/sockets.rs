//! Where brokers listen, and which one is meant.
#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use dax_backend::broker::ConnectError;
use dax_backend::broker::admin::{AdminClient, AdminError};

/// Names the broker for `dcm` and for programs.
pub(crate) const VARIABLE: &str = "DCM_SOCKET";
/// The broker of the whole machine.
const SYSTEM: &str = "/run/dcmalloc/broker.sock";
const SYSTEM_DIRECTORY: &str = "/run/dcmalloc";

/// Why no broker was chosen.
#[derive(Debug)]
pub(crate) enum NoBroker {
    /// None is running.
    None {
        /// Where one was expected, if somebody said so.
        expected: Option<(PathBuf, String)>,
    },
    /// Several are, and none is the machine's.
    Several(Vec<PathBuf>),
}

impl std::fmt::Display for NoBroker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::None { expected: None } => f.write_str(
                "no broker is running: start one with `dcm serve --emulate 1G`, \
                 or name its socket with --socket",
            ),
            Self::None {
                expected: Some((path, why)),
            } => write!(
                f,
                "no broker at {}: {why}; start one with `dcm serve --emulate 1G --socket {}`",
                path.display(),
                path.display()
            ),
            Self::Several(paths) => {
                f.write_str("several brokers are running, choose one with --socket:")?;
                paths
                    .iter()
                    .try_for_each(|path| write!(f, " {}", path.display()))
            }
        }
    }
}

impl std::error::Error for NoBroker {}

/// The broker that is meant: `--socket`, else `$DCM_SOCKET`, else the
/// machine's, else the only one that is running.
pub(crate) fn find(option: Option<&Path>) -> Result<PathBuf, NoBroker> {
    let named = option.map(PathBuf::from).or_else(|| {
        env::var_os(VARIABLE)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    });
    if let Some(path) = named {
        return match answers(&path) {
            Ok(()) => Ok(path),
            Err(why) => Err(NoBroker::None {
                expected: Some((path, why)),
            }),
        };
    }
    if answers(Path::new(SYSTEM)).is_ok() {
        return Ok(SYSTEM.into());
    }
    let mut live: Vec<PathBuf> = candidates()
        .into_iter()
        .filter(|path| answers(path).is_ok())
        .collect();
    match live.len() {
        0 => Err(NoBroker::None { expected: None }),
        1 => Ok(live.remove(0)),
        _ => Err(NoBroker::Several(live)),
    }
}

/// Whether a broker that this user may trust answers at `path`.
fn answers(path: &Path) -> Result<(), String> {
    match AdminClient::connect(path) {
        Ok(_) => Ok(()),
        // Not for this user's orders, but perhaps for its programs.
        Err(AdminError::Connect {
            source:
                ConnectError::Refused {
                    code: dax_backend::broker::protocol::RefusedCode::User,
                    ..
                },
            ..
        }) => Ok(()),
        Err(AdminError::Connect { source, .. }) => Err(source.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

fn candidates() -> Vec<PathBuf> {
    let mut directories = vec![PathBuf::from(SYSTEM_DIRECTORY), temporary_directory()];
    if let Some(user) = user_directory() {
        directories.insert(1, user);
    }
    let mut sockets: Vec<PathBuf> = directories
        .iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "sock"))
        .collect();
    sockets.sort();
    sockets
}

fn user_directory() -> Option<PathBuf> {
    let runtime = env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())?;
    Some(Path::new(&runtime).join("dcmalloc"))
}

fn temporary_directory() -> PathBuf {
    let uid = rustix::process::geteuid().as_raw();
    env::temp_dir().join(format!("dcmalloc-{uid}"))
}

/// Whether this process may serve everybody on the machine.
pub(crate) fn is_system() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where this user's brokers listen: made if it is missing, refused if it is
/// somebody else's.
pub(crate) fn directory() -> anyhow::Result<PathBuf> {
    let mut choices = vec![temporary_directory()];
    if is_system() {
        choices.insert(0, SYSTEM_DIRECTORY.into());
    } else if let Some(user) = user_directory() {
        choices.insert(0, user);
    }
    let mut last = None;
    for directory in choices {
        match usable(&directory) {
            Ok(()) => return Ok(directory),
            Err(error) => last = Some(error),
        }
    }
    match last {
        Some(error) => Err(error.context("no directory for a socket: name one with --socket")),
        None => bail!("no directory for a socket: name one with --socket"),
    }
}

fn usable(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let mode = if is_system() { 0o755 } else { 0o700 };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let owner = fs::symlink_metadata(directory)?.uid();
    let own = rustix::process::geteuid().as_raw();
    if owner != own {
        bail!("{} belongs to user {owner}", directory.display());
    }
    rustix::fs::access(directory, rustix::fs::Access::WRITE_OK)
        .with_context(|| format!("cannot write to {}", directory.display()))?;
    Ok(())
}
