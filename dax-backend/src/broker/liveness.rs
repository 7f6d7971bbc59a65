//! When a lease ends: when no process maps the client page any more.
//!
//! Not when the socket closes (a daemon closes its descriptors and lives), and
//! not when the process dies (a forked child may map what it mapped). The
//! kernel itself counts the writable shared mappings of a memfd, and refuses
//! `F_SEAL_WRITE` with `EBUSY` while there is one (fcntl(2)).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::{Errno, pread, pwrite};

use uuid::Uuid;

use super::client_page::{ClientStats, KEY_OFFSET, LOST_OFFSET, PAGE_SIZE, PAGE_VERSION};

/// What a look at a client page says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// Some process maps it.
    Mapped,
    /// The last mapping is gone, and no process can map it again.
    Ended,
    /// Nothing any more: the client has broken the protocol and sealed the
    /// seals. Only the end of its process tells.
    Barred,
}

impl Look {
    /// Whether what the page stands for has ended; `gone`: its process has.
    pub(super) fn ended(self, gone: impl FnOnce() -> bool) -> bool {
        match self {
            Self::Mapped => false,
            Self::Ended => true,
            Self::Barred => gone(),
        }
    }
}

/// The broker's side of one client page.
#[derive(Debug)]
pub(super) struct Liveness {
    page: OwnedFd,
}

impl Liveness {
    /// A new page, mapped by nobody, which is [`Look::Ended`] until a client maps it.
    pub(super) fn new() -> Result<Self, Errno> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let page = memfd_create("dcmalloc-client", flags)?;
        ftruncate(&page, PAGE_SIZE as u64)?;
        // A client that shrank it would raise SIGBUS in its own forked children.
        fcntl_add_seals(&page, SealFlags::SHRINK | SealFlags::GROW)?;
        pwrite(&page, &PAGE_VERSION.to_ne_bytes(), 0)?;
        let key = Uuid::new_v4().as_u128();
        pwrite(&page, &key.to_ne_bytes(), KEY_OFFSET as u64)?;
        Ok(Self { page })
    }

    /// The page of a client that an earlier broker had.
    pub(super) fn adopt(page: OwnedFd) -> Self {
        Self { page }
    }

    /// The key in the page, as long as the client has not written over it.
    pub(super) fn key(&self) -> u128 {
        let mut key = [0; 16];
        let _ = pread(&self.page, &mut key, KEY_OFFSET as u64);
        u128::from_ne_bytes(key)
    }

    /// The page, to be sent to the client. The broker must never map it.
    pub(super) fn page(&self) -> BorrowedFd<'_> {
        self.page.as_fd()
    }

    /// Says in the page that what it stands for is gone.
    pub(super) fn say_lost(&self) {
        let _ = pwrite(&self.page, &1u64.to_ne_bytes(), LOST_OFFSET as u64);
    }

    /// Whether that has been said.
    pub(super) fn is_lost(&self) -> bool {
        let mut word = [0; 8];
        let _ = pread(&self.page, &mut word, LOST_OFFSET as u64);
        u64::from_ne_bytes(word) != 0
    }

    /// Whether the last mapping is gone.
    pub(super) fn look(&self) -> Look {
        match fcntl_add_seals(&self.page, SealFlags::WRITE) {
            Ok(()) => Look::Ended,
            Err(Errno::PERM) => Look::Barred,
            Err(_) => Look::Mapped,
        }
    }

    /// What the client has counted so far.
    pub(super) fn stats(&self) -> ClientStats {
        let mut bytes = [0; PAGE_SIZE];
        let read = pread(&self.page, &mut bytes, 0).unwrap_or(0);
        ClientStats::from_bytes(&bytes[..read])
    }
}

/// When to look again whether a client that seems gone is gone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Probe {
    since: Instant,
    next: Instant,
}

impl Probe {
    pub(super) fn start(now: Instant) -> Self {
        Self {
            since: now,
            next: now,
        }
    }

    pub(super) fn due(&self) -> Instant {
        self.next
    }

    /// Whether a process that died would be gone by now: somebody lives on.
    pub(super) fn is_hopeless(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= Duration::from_millis(200)
    }

    /// Notes a look in vain. Mappings of a dead process go within milliseconds;
    /// whoever lives on may do so for days.
    pub(super) fn again(&mut self, now: Instant) {
        let waited = now.saturating_duration_since(self.since);
        self.next = now
            + if waited < Duration::from_secs(2) {
                Duration::from_millis(20)
            } else {
                Duration::from_millis(250)
            };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::client_page::ClientPageMapping;

    #[test]
    fn the_lease_lasts_exactly_as_long_as_a_mapping() {
        let liveness = Liveness::new().unwrap();
        let first = ClientPageMapping::map(liveness.page()).unwrap();
        let second = ClientPageMapping::map(liveness.page()).unwrap();
        assert_eq!(liveness.look(), Look::Mapped);
        drop(first);
        assert_eq!(liveness.look(), Look::Mapped);
        drop(second);
        assert_eq!(liveness.look(), Look::Ended);
        assert!(ClientPageMapping::map(liveness.page()).is_err());
        assert_eq!(liveness.stats().version, PAGE_VERSION);
    }

    #[test]
    fn a_client_that_takes_the_seals_away_is_found_out() {
        let liveness = Liveness::new().unwrap();
        let mapped = ClientPageMapping::map(liveness.page()).unwrap();
        fcntl_add_seals(liveness.page(), SealFlags::SEAL).unwrap();
        assert_eq!(liveness.look(), Look::Barred);
        drop(mapped);
        assert_eq!(liveness.look(), Look::Barred);
        assert!(Look::Barred.ended(|| true) && !Look::Barred.ended(|| false));
        assert!(!Look::Mapped.ended(|| true) && Look::Ended.ended(|| false));
    }
}
