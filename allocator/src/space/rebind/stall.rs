//! How long threads waited for granules in flight.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Four buckets to each power of two of nanoseconds.
const BUCKETS: usize = 64 * 4;

/// A histogram that the mover adds to and anyone reads.
pub(super) struct Stalls {
    buckets: [AtomicU64; BUCKETS],
    max: AtomicU64,
    total: AtomicU64,
}

impl Stalls {
    pub(super) const fn new() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            max: AtomicU64::new(0),
            total: AtomicU64::new(0),
        }
    }

    /// Forgets what another process counted, whose copy this is.
    pub(super) fn clear(&self) {
        self.buckets.iter().for_each(|n| n.store(0, Relaxed));
        self.max.store(0, Relaxed);
        self.total.store(0, Relaxed);
    }

    pub(super) fn record(&self, ns: u64) {
        self.buckets[bucket(ns)].fetch_add(1, Relaxed);
        self.max.fetch_max(ns, Relaxed);
        self.total.fetch_add(ns, Relaxed);
    }

    pub(super) fn snapshot(&self) -> StallHistogram {
        StallHistogram {
            buckets: core::array::from_fn(|i| self.buckets[i].load(Relaxed)),
            max: self.max.load(Relaxed),
            total: self.total.load(Relaxed),
        }
    }
}

/// Waits of threads on granules in flight, in nanoseconds, each from the
/// moment the monitor heard of it to the moment the thread was woken. Waits
/// that ended before the monitor heard of them are not in it.
#[derive(Clone, Copy)]
pub struct StallHistogram {
    buckets: [u64; BUCKETS],
    max: u64,
    total: u64,
}

impl StallHistogram {
    /// What was added since `earlier` was taken. The maximum of a difference
    /// is known to a quarter of a power of two only.
    pub fn since(&self, earlier: &Self) -> Self {
        let buckets = core::array::from_fn(|i| self.buckets[i] - earlier.buckets[i]);
        let max = match buckets.iter().rposition(|&n| n > 0) {
            Some(_) if self.max > earlier.max => self.max,
            Some(top) => upper_bound(top).min(self.max),
            None => 0,
        };
        let total = self.total - earlier.total;
        Self {
            buckets,
            max,
            total,
        }
    }

    /// How many waits there were.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// The waits shorter than 2 to the power of `first` nanoseconds, then those
    /// shorter than twice as much, and so on; the last bucket has all others.
    pub fn by_power<const N: usize>(&self, first: u32) -> [u64; N] {
        let mut powers = [0; N];
        for (i, n) in self.buckets.iter().enumerate() {
            let power = (i as u32 / 4 + 1).saturating_sub(first) as usize;
            powers[power.min(N - 1)] += n;
        }
        powers
    }

    /// All waits together in nanoseconds.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The longest wait in nanoseconds, 0 if there was none.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The wait in nanoseconds that `share` of the waits did not exceed
    /// (`0.99`: the 99th percentile), rounded up by at most a quarter of a
    /// power of two.
    pub fn percentile(&self, share: f64) -> u64 {
        let wanted = (self.count() as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= wanted && *n > 0 {
                return upper_bound(i).min(self.max);
            }
        }
        self.max
    }
}

/// The bucket of `ns`: its power of two, then the two bits below the top one.
fn bucket(ns: u64) -> usize {
    let power = (ns | 4).ilog2();
    (power * 4 + (ns >> (power - 2)) as u32 % 4) as usize
}

/// The largest value of a bucket.
fn upper_bound(bucket: usize) -> u64 {
    let (power, quarter) = (bucket as u32 / 4, bucket as u64 % 4);
    let width = 1u64 << power.saturating_sub(2);
    ((4 + quarter) * width).saturating_add(width - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_hold_every_wait_once() {
        let stalls = Stalls::new();
        for ns in [0, 1, 2047, 2048, 4095, 4096, 1 << 40] {
            stalls.record(ns);
        }
        let histogram = stalls.snapshot();
        assert_eq!(histogram.by_power::<4>(11), [3, 2, 1, 1]);
        assert_eq!(histogram.total(), 1 + 2047 + 2048 + 4095 + 4096 + (1 << 40));
    }

    #[test]
    fn a_value_is_at_most_its_buckets_bound_and_within_a_quarter_of_it() {
        for power in 2..63 {
            for step in 0..8 {
                let ns = (1u64 << power) + step * (1u64 << (power - 2)) / 2;
                let bound = upper_bound(bucket(ns));
                assert!(bound >= ns && bound - ns <= ns / 4 + 1, "{ns} in {bound}");
            }
        }
    }

    #[test]
    fn percentiles_and_differences_count_each_wait_once() {
        let stalls = Stalls::new();
        stalls.record(1_000_000);
        let before = stalls.snapshot();
        for _ in 0..98 {
            stalls.record(1_000);
        }
        stalls.record(50_000);
        stalls.record(90_000);
        let now = stalls.snapshot().since(&before);
        assert_eq!(now.count(), 100);
        assert!((1_000..1_250).contains(&now.percentile(0.5)));
        assert!((50_000..62_500).contains(&now.percentile(0.99)));
        assert!((90_000..112_500).contains(&now.max()), "{}", now.max());
        assert_eq!(stalls.snapshot().max(), 1_000_000);
    }

    #[test]
    fn an_empty_histogram_says_zero() {
        let none = Stalls::new().snapshot();
        assert_eq!((none.count(), none.max(), none.percentile(0.99)), (0, 0, 0));
    }
}
