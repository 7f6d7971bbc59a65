//! Pressure on the host's DRAM, as the kernel tells of it: a trigger on
//! `/proc/pressure/memory` (the kernel's Documentation/accounting/psi.rst).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::protocol::{Kind, Message};
use super::server::Broker;

const FILE: &str = "/proc/pressure/memory";
/// Some task has waited for memory for a tenth of two seconds. Windows of two
/// seconds need no right (Linux 6.4 and later).
const TRIGGER: &[u8] = b"some 200000 2000000\0";
/// Nothing more is heard for so long: what clients do takes time.
const PAUSE: Duration = Duration::from_secs(1);

/// Whether the host's memory is watched, for `dcm status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PressureStatus {
    /// Why it is not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub missing: Option<String>,
    /// Times that DRAM was short.
    pub seen: u64,
}

/// What tells of pressure.
#[derive(Debug)]
pub(super) struct Pressure {
    trigger: Option<OwnedFd>,
    heard_until: Instant,
    pub(super) status: PressureStatus,
}

impl Pressure {
    /// Watches this machine, if its kernel lets us.
    pub(super) fn of_host(now: Instant) -> Self {
        let opened = rustix::fs::open(
            FILE,
            OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let trigger = opened.and_then(|file| rustix::io::write(&file, TRIGGER).map(|_| file));
        let missing = trigger.as_ref().err().map(|errno| match *errno {
            Errno::NOENT | Errno::OPNOTSUPP => {
                format!("{FILE}: the kernel does not count pressure; boot it with psi=1")
            }
            Errno::PERM | Errno::ACCESS | Errno::INVAL => {
                format!("{FILE}: a trigger takes root, or Linux 6.4 and later")
            }
            errno => format!("{FILE}: {errno}"),
        });
        Self {
            trigger: trigger.ok(),
            heard_until: now,
            status: PressureStatus { missing, seen: 0 },
        }
    }

    /// What becomes ready for `POLLPRI` under pressure, if that is to be heard now.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        let trigger = self.trigger.as_ref()?;
        (Instant::now() >= self.heard_until).then(|| trigger.as_fd())
    }
}

impl Broker {
    /// Watches `trigger` instead of the kernel's file: `POLLPRI` on it says that
    /// DRAM is short.
    pub fn watch_pressure(&mut self, trigger: OwnedFd) {
        self.pressure.trigger = Some(trigger);
        self.pressure.status.missing = None;
    }

    /// DRAM is short: clients put on extents what they can, and let go of what
    /// they only keep.
    pub(super) fn under_pressure(&mut self, now: Instant) {
        self.pressure.heard_until = now + PAUSE;
        self.pressure.status.seen += 1;
        tracing::info!("the host is short of DRAM");
        let clients = self.clients.values();
        let connections: Vec<_> = clients.filter_map(|client| client.connection).collect();
        for connection in connections {
            self.post(Some(connection), Message::new(Kind::DramShort));
        }
    }

    /// Nothing is heard of the trigger any more.
    pub(super) fn pressure_gone(&mut self) {
        self.pressure.trigger = None;
        self.pressure.status.missing = Some(format!("{FILE}: the trigger is gone"));
    }
}
