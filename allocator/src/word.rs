//! An atomic number that threads can wait on: futex(2).
#![forbid(unsafe_code)]

use core::ops::Deref;
use core::sync::atomic::AtomicU32;
use core::time::Duration;
use rustix::thread::futex;

/// Threads of one process wait until it changes.
pub(crate) struct Word(AtomicU32);

impl Word {
    pub(crate) const fn new(value: u32) -> Self {
        Self(AtomicU32::new(value))
    }

    /// Sleeps while the word is `expected`, until woken or for `timeout`.
    /// Returns for other reasons too: look again.
    pub(crate) fn wait(&self, expected: u32, timeout: Option<Duration>) {
        let timeout = timeout.map(|timeout| futex::Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        let _ = futex::wait(&self.0, futex::Flags::PRIVATE, expected, timeout.as_ref());
    }

    /// Wakes up to `threads` that sleep.
    pub(crate) fn wake(&self, threads: u32) {
        let _ = futex::wake(&self.0, futex::Flags::PRIVATE, threads);
    }
}

impl Deref for Word {
    type Target = AtomicU32;
    fn deref(&self) -> &AtomicU32 {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use crate::sync::{Lock, Signal};
    use core::time::Duration;

    #[test]
    fn no_increment_is_lost() {
        let lock = Lock::new(0u64);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..50_000).for_each(|_| *lock.lock() += 1));
            }
        });
        assert_eq!(*lock.lock(), 200_000);
    }

    #[test]
    fn a_raised_signal_is_not_slept_through() {
        let signal = Signal::new();
        let seen = signal.read();
        signal.raise();
        let start = std::time::Instant::now();
        signal.wait(seen, Duration::from_secs(20));
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
