//! What threads share without a lock, and the lock itself, in every order of
//! steps that the memory model allows: the shipped files, over loom's atomics.
//!
//! Time-outs never end a wait here: what would be slept through for ever is a
//! deadlock, which loom reports. What is to be shared is used once before it
//! is: loom's parts are made when they are first used, and no thread may find
//! them half made.

mod atomic;
#[path = "../../src/sync.rs"]
#[allow(dead_code, unreachable_pub, reason = "a part of another crate")]
mod sync;
#[path = "../../src/space/rebind/waiters.rs"]
mod waiters;
mod word;

use allocator::space::GRANULE;
use loom::cell::UnsafeCell;
use loom::model::Builder;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering::*};
use loom::thread;
use std::time::Duration;
use sync::{Lock, Signal};
use waiters::Waiters;

/// As `waiters` has it of its own module.
const PAGE: usize = 4096;

/// Tries every order with at most three preemptions.
fn model(f: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(f);
}

#[test]
fn a_lock_is_held_by_one_thread() {
    model(|| {
        let lock = Arc::new(Lock::new(UnsafeCell::new(0)));
        drop(lock.lock());
        let add = |lock: &Lock<UnsafeCell<u32>>| {
            // loom panics where the accesses of two threads are not ordered.
            // SAFETY: which is the point.
            lock.lock().with_mut(|value| unsafe { *value += 1 });
        };
        let others: Vec<_> = (0..2)
            .map(|_| {
                let lock = Arc::clone(&lock);
                thread::spawn(move || add(&lock))
            })
            .collect();
        add(&lock);
        others.into_iter().for_each(|other| other.join().unwrap());
        // SAFETY: as above.
        let sum = lock.lock().with(|value| unsafe { *value });
        assert_eq!(sum, 3);
    });
}

#[test]
fn a_child_goes_on_with_what_its_parent_had_locked() {
    model(|| {
        let lock = Arc::new(Lock::new(()));
        std::mem::forget(lock.lock());
        let waiting = Arc::clone(&lock);
        let waiter = thread::spawn(move || drop(waiting.lock()));
        // SAFETY: this thread holds it and has forgotten the guard.
        unsafe { lock.force_unlock() };
        waiter.join().unwrap();
    });
}

#[test]
fn a_raised_signal_wakes_whoever_has_not_seen_why() {
    model(|| {
        let shared = Arc::new((Signal::new(), AtomicU32::new(0)));
        shared.0.raise();
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let (signal, work) = &*shared;
                    loop {
                        let seen = signal.read();
                        if work.load(Relaxed) == 7 {
                            return;
                        }
                        signal.wait(seen, Duration::MAX);
                    }
                })
            })
            .collect();
        let (signal, work) = &*shared;
        work.store(7, Relaxed);
        signal.raise();
        waiters.into_iter().for_each(|w| w.join().unwrap());
    });
}

/// A wait of its own moment for each granule.
const fn since(granule: usize) -> u64 {
    10 * granule as u64
}

/// Takes out who has waited longest.
fn take(waiters: &Waiters<2>, taken: &mut usize) {
    if let Some(granule) = waiters.longest(0..usize::MAX) {
        let before = *taken;
        waiters.remove(granule, |began| {
            assert_eq!(began, since(granule / GRANULE));
            *taken += 1;
        });
        assert!(*taken > before, "only the mover takes out");
    }
}

#[test]
fn a_wait_is_taken_out_once_with_the_moment_it_began() {
    model(|| {
        let waiters = Arc::new(Waiters::<2>::new());
        (0..3).for_each(|_| waiters.insert(GRANULE, 1, 0));
        assert!(waiters.take_overflow());
        waiters.remove(GRANULE, |_| ());
        let mover = Arc::clone(&waiters);
        let mover = thread::spawn(move || {
            let mut taken = 0;
            take(&mover, &mut taken);
            take(&mover, &mut taken);
            taken
        });
        // Three waits for two slots, of which the mover frees some meanwhile.
        for granule in [1, 2, 3] {
            waiters.insert(granule * GRANULE + 8, 1, since(granule));
        }
        let mut taken = mover.join().unwrap();
        let forgotten = waiters.take_overflow();
        take(&waiters, &mut taken);
        take(&waiters, &mut taken);
        assert_eq!(waiters.longest(0..usize::MAX), None);
        assert_eq!(taken + usize::from(forgotten), 3);
    });
}

#[test]
fn waits_are_known_by_granule_and_the_longest_comes_first() {
    model(|| {
        let waiters = Waiters::<4>::new();
        waiters.insert(5 * GRANULE + 4097, 1, 30);
        waiters.insert(3 * GRANULE, 1, 20);
        waiters.insert(5 * GRANULE + 8192, 2, 10);
        assert_eq!(waiters.latest_of(1, 0), Some(5 * GRANULE + 4096));
        assert_eq!(waiters.latest_of(2, 10), Some(5 * GRANULE + 8192));
        assert_eq!(waiters.latest_of(2, 11), None);
        assert_eq!(waiters.longest(0..usize::MAX), Some(5 * GRANULE));
        assert_eq!(waiters.longest(0..4 * GRANULE), Some(3 * GRANULE));
        let mut began = Vec::new();
        waiters.remove(5 * GRANULE, |since| began.push(since));
        assert_eq!(began, [30, 10]);
        assert_eq!(waiters.longest(0..usize::MAX), Some(3 * GRANULE));
        waiters.clear();
        assert_eq!(waiters.longest(0..usize::MAX), None);
    });
}

#[test]
fn a_wait_too_many_is_said_once() {
    model(|| {
        let waiters = Waiters::<2>::new();
        waiters.insert(GRANULE, 1, 0);
        waiters.insert(2 * GRANULE, 1, 0);
        assert!(!waiters.take_overflow());
        waiters.insert(GRANULE, 1, 0);
        assert!(waiters.take_overflow());
        assert!(!waiters.take_overflow());
        waiters.remove(GRANULE, |_| ());
        waiters.insert(7 * GRANULE, 1, 0);
        assert!(!waiters.take_overflow());
    });
}
