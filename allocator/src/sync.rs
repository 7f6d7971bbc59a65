//! A lock that may be held across a fork, and a way to wait for a change.
//!
//! std's locks do not allocate either, but offer no way to unlock in a child
//! what the parent's thread locked. Everything here is a futex(2) word, of
//! which `tests/models.rs` has another kind: there loom tries every order in
//! which threads can get at it.

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};
use core::sync::atomic::Ordering;
use core::time::Duration;

use super::word::Word;

const FREE: u32 = 0;
const HELD: u32 = 1;
/// Held, and somebody may be asleep waiting.
const CONTENDED: u32 = 2;

/// A mutual-exclusion lock.
pub struct Lock<T> {
    word: Word,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached only by the one thread that holds the lock.
unsafe impl<T: Send> Sync for Lock<T> {}

/// Access to what a [`Lock`] guards; unlocks when dropped.
pub struct Guard<'a, T>(&'a Lock<T>);

impl<T> Lock<T> {
    /// An unlocked lock.
    pub const fn new(value: T) -> Self {
        Self {
            word: Word::new(FREE),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock and takes it.
    pub fn lock(&self) -> Guard<'_, T> {
        if self
            .word
            .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            while self.word.swap(CONTENDED, Ordering::Acquire) != FREE {
                self.word.wait(CONTENDED, None);
            }
        }
        Guard(self)
    }

    /// Unlocks without a guard.
    ///
    /// # Safety
    /// The calling thread, or the one that it is a forked copy of, holds the
    /// lock and has forgotten its guard.
    pub unsafe fn force_unlock(&self) {
        if self.word.swap(FREE, Ordering::Release) == CONTENDED {
            self.word.wake(1);
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard's thread holds the lock.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard's thread holds the lock, and `self` is borrowed
        // for as long as the reference lives.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this guard's thread holds the lock and gives the guard up.
        unsafe { self.0.force_unlock() };
    }
}

/// A counter that threads wait on: read it, look whether there is something
/// to do, and wait until it has moved on from what was read.
pub struct Signal(Word);

impl Default for Signal {
    fn default() -> Self {
        Self::new()
    }
}

impl Signal {
    /// A signal that was never raised.
    pub const fn new() -> Self {
        Self(Word::new(0))
    }

    /// What to pass to [`Signal::wait`].
    pub fn read(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Wakes everyone who waits.
    pub fn raise(&self) {
        self.0.fetch_add(1, Ordering::Release);
        self.0.wake(i32::MAX as u32);
    }

    /// Waits until the signal was raised since `seen` was read, at most for
    /// `timeout`.
    pub fn wait(&self, seen: u32, timeout: Duration) {
        self.0.wait(seen, Some(timeout));
    }
}
