//! What a heap held over its life: a sum of bytes times time.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};
use rustix::time::{ClockId, clock_gettime};

use crate::space::Usage;

/// Samples of [`Usage`], each counted for the time since the one before. In KiB
/// times ms: 100 GiB for five years fit.
pub(crate) struct OverTime {
    /// When the last sample was, in ms of `CLOCK_MONOTONIC`; 0: there was none.
    last: AtomicU64,
    live: AtomicU64,
    on_extents: AtomicU64,
}

impl OverTime {
    pub(crate) const fn new() -> Self {
        Self {
            last: AtomicU64::new(0),
            live: AtomicU64::new(0),
            on_extents: AtomicU64::new(0),
        }
    }

    /// Counts from now on, from nothing.
    pub(crate) fn begin(&self) {
        self.last.store(now(), Ordering::Relaxed);
        self.live.store(0, Ordering::Relaxed);
        self.on_extents.store(0, Ordering::Relaxed);
    }

    /// Counts a sample. Two at once share the time between them.
    pub(crate) fn sample(&self, usage: &Usage, outside: u64) {
        self.sample_at(now(), usage, outside);
    }

    fn sample_at(&self, now: u64, usage: &Usage, outside: u64) {
        let on_extents = usage.extent_live + usage.inherited;
        let live = on_extents + usage.dram_live + usage.spilled + outside;
        let last = self.last.swap(now, Ordering::Relaxed);
        let time = now.saturating_sub(last);
        self.live.fetch_add((live >> 10) * time, Ordering::Relaxed);
        self.on_extents
            .fetch_add((on_extents >> 10) * time, Ordering::Relaxed);
    }

    /// What was in use, and of that on extents, in KiB times ms.
    pub(crate) fn sums(&self) -> (u64, u64) {
        (
            self.live.load(Ordering::Relaxed),
            self.on_extents.load(Ordering::Relaxed),
        )
    }
}

fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_count_for_as_long_as_they_were_there() {
        let sums = OverTime::new();
        sums.begin();
        let begun = sums.last.load(Ordering::Relaxed);
        let dram = Usage {
            dram_live: 8 << 10,
            ..Usage::NEW
        };
        let extents = Usage {
            extent_live: 4 << 10,
            inherited: 2 << 10,
            ..Usage::NEW
        };
        sums.sample_at(begun + 10, &dram, 1 << 10);
        sums.sample_at(begun + 40, &extents, 0);
        assert_eq!(sums.sums(), (9 * 10 + 6 * 30, 6 * 30));
        sums.begin();
        assert_eq!(sums.sums(), (0, 0));
    }
}
