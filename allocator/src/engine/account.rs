//! What an arena of the program may take, and what it has taken.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};

use crate::placement::OnExhausted;

/// Counts the pages of one arena against its limit. All zero: nothing taken,
/// no limit, DRAM where extents have run out.
pub struct Account {
    taken: AtomicU64,
    /// Bytes that may be taken, less one; 0: any.
    limit: AtomicU64,
    /// How often the limit refused something.
    refused: AtomicU64,
    /// `DRAM`, `FAIL`, or from `WAIT` on, milliseconds to wait.
    on_exhausted: AtomicU64,
}

const DRAM: u64 = 0;
const FAIL: u64 = 1;
const WAIT: u64 = 2;

impl Account {
    /// An account over nothing.
    pub(crate) const fn new() -> Self {
        Self {
            taken: AtomicU64::new(0),
            limit: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            on_exhausted: AtomicU64::new(DRAM),
        }
    }

    /// Starts again for a new arena.
    pub(crate) fn open(&self, limit: Option<u64>, policy: OnExhausted) {
        let policy = match policy {
            OnExhausted::Dram => DRAM,
            OnExhausted::Fail => FAIL,
            OnExhausted::Wait(ms) => WAIT + u64::from(ms),
        };
        self.taken.store(0, Ordering::Relaxed);
        self.refused.store(0, Ordering::Relaxed);
        self.on_exhausted.store(policy, Ordering::Relaxed);
        let limit = limit.map_or(0, |bytes| bytes.saturating_add(1));
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Books `bytes`, if the limit allows it.
    pub(super) fn take(&self, bytes: usize) -> bool {
        let before = self.taken.fetch_add(bytes as u64, Ordering::Relaxed);
        let limit = self.limit.load(Ordering::Relaxed);
        let fits = limit == 0 || before + (bytes as u64) < limit;
        if !fits {
            self.put_back(bytes);
        }
        fits
    }

    pub(super) fn note_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn put_back(&self, bytes: usize) {
        self.taken.fetch_sub(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes of pages that the arena has.
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// How often the limit refused something.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Bytes of pages that the arena may have; `None`: any.
    pub fn limit(&self) -> Option<u64> {
        self.limit.load(Ordering::Relaxed).checked_sub(1)
    }

    pub(super) fn on_exhausted(&self) -> OnExhausted {
        match self.on_exhausted.load(Ordering::Relaxed) {
            DRAM => OnExhausted::Dram,
            FAIL => OnExhausted::Fail,
            ms => OnExhausted::Wait((ms - WAIT) as u32),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_the_last_byte_that_fits() {
        let account = Account::new();
        assert_eq!((account.limit(), account.take(1 << 40)), (None, true));
        account.open(Some(8192), OnExhausted::Wait(7));
        assert_eq!(account.on_exhausted(), OnExhausted::Wait(7));
        assert!(account.take(4096) && account.take(4096));
        assert!(!account.take(4096));
        assert_eq!((account.taken(), account.limit()), (8192, Some(8192)));
        account.put_back(4096);
        assert!(account.take(4096));
        account.open(Some(0), OnExhausted::Fail);
        assert!(!account.take(1), "a limit of nothing");
    }
}
