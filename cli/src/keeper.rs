//! The keeper: the process that `dcm serve` is. It holds what must outlive the
//! broker, has a worker do everything else, and starts another when it dies.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::env;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use dax_backend::broker::{Listener, Notice, StoreSocket};
use dax_backend::model::SoftwareDevice;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::failure::Failure;
use crate::signals::Signals;

/// Names of what every worker gets.
pub(crate) const LISTENER: &str = "listener";
pub(crate) const WINDOW: &str = "window";
pub(crate) const REGISTERS: &str = "registers";
pub(crate) const FABRIC: &str = "fabric";

/// The first pause before another worker is started, and the longest.
const SOON: Duration = Duration::from_millis(10);
const SELDOM: Duration = Duration::from_secs(1);
/// A worker that has lived so long was no failure from the start.
const STABLE: Duration = Duration::from_secs(10);

/// Has workers serve `model` at `listener` until a signal comes. `ready` is
/// called once, when the first of them serves.
pub(crate) fn keep(
    model: &SoftwareDevice,
    listener: &Listener,
    signals: &Signals,
    mut ready: impl FnMut() -> anyhow::Result<()>,
) -> Result<(), Failure> {
    let copy = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let mut kept = BTreeMap::from([
        (LISTENER.to_owned(), copy(listener.as_fd())?),
        (WINDOW.to_owned(), copy(model.memory())?),
    ]);
    let (mut served, mut failures) = (false, 0u32);
    for restarts in 0u64.. {
        let started = Instant::now();
        let mut worker = Worker::start(model, &kept, restarts)?;
        let ended = worker.watch(signals, &mut kept, || {
            if !std::mem::replace(&mut served, true) {
                ready()?;
            }
            Ok(())
        })?;
        match ended.code() {
            Some(0) => return Ok(()),
            // It has said why.
            _ if !served => return Err(anyhow!("the broker did not start").into()),
            _ => {}
        }
        failures = if started.elapsed() < STABLE {
            failures + 1
        } else {
            0
        };
        thread::sleep((SOON * (1 << failures.min(10))).min(SELDOM));
    }
    Ok(())
}

/// One process that serves.
struct Worker {
    process: Child,
    store: StoreSocket,
}

impl Worker {
    fn start(
        model: &SoftwareDevice,
        kept: &BTreeMap<String, OwnedFd>,
        restarts: u64,
    ) -> anyhow::Result<Self> {
        let (store, theirs) = StoreSocket::pair().context("no descriptor left")?;
        let process = Command::new("/proc/self/exe")
            .arg0("dcm")
            .args(env::args_os().skip(1))
            .args(["--worker", &restarts.to_string()])
            .stdin(theirs.into_fd())
            .spawn()
            .context("cannot start the broker")?;
        let worker = Self { process, store };
        // A worker that is gone already gets nothing; its end shows by itself.
        let _ = worker.hand_over(model, kept);
        Ok(worker)
    }

    /// The device's registers have a socket of their own for each worker: what
    /// a killed one had asked is nobody's.
    fn hand_over(
        &self,
        model: &SoftwareDevice,
        kept: &BTreeMap<String, OwnedFd>,
    ) -> Result<(), Errno> {
        for (name, fd) in kept {
            self.store.keep(name, fd.as_fd())?;
        }
        let pair = || {
            let flags = SocketFlags::CLOEXEC;
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        };
        let (registers, theirs) = pair()?;
        self.store.keep(REGISTERS, theirs.as_fd())?;
        let device = model.clone();
        thread::spawn(move || device.serve_registers(&registers));
        let (fabric, theirs) = pair()?;
        self.store.keep(FABRIC, theirs.as_fd())?;
        let device = model.clone();
        thread::spawn(move || device.serve_fabric(&fabric));
        self.store.ready()
    }

    /// Keeps what it wants kept, and hands signals on, until it ends.
    fn watch(
        &mut self,
        signals: &Signals,
        kept: &mut BTreeMap<String, OwnedFd>,
        mut ready: impl FnMut() -> anyhow::Result<()>,
    ) -> anyhow::Result<std::process::ExitStatus> {
        let pid = Pid::from_child(&self.process);
        let ended = pidfd_open(pid, PidfdFlags::empty()).context("cannot watch the broker")?;
        let mut talking = true;
        loop {
            let mut fds = vec![
                PollFd::new(&ended, PollFlags::IN),
                PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
            ];
            if talking {
                fds.push(PollFd::new(&self.store, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).context("cannot wait for the broker"),
            }
            let fired = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            let (is_over, told, said) = (fired(0), fired(1), fired(2));
            // Of one that is over, all that it has said.
            while talking && (said || is_over) {
                match self.store.receive() {
                    Ok(Some(Notice::Keep(name, fd))) => drop(kept.insert(name, fd)),
                    Ok(Some(Notice::Forget(name))) => drop(kept.remove(&name)),
                    Ok(Some(Notice::Ready)) => ready()?,
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => talking = false,
                }
                if !is_over {
                    break;
                }
            }
            if is_over {
                return Ok(self.process.wait()?);
            }
            if told && signals.wait().is_some() {
                // It may have ended in this instant.
                let _ = kill_process(pid, Signal::TERM);
            }
        }
    }
}
