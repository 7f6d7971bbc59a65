//! futex(2) as loom can follow it: the kernel looks at the word under a lock
//! of its own, which whoever wakes takes too.

use std::ops::Deref;
use std::sync::OnceLock;
use std::time::Duration;

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Condvar, Mutex};

pub(crate) struct Word {
    first: u32,
    /// Made when it is first looked at: loom's parts can't be made by a
    /// `const fn`.
    made: OnceLock<Made>,
}

pub(crate) struct Made {
    value: AtomicU32,
    sleepers: Mutex<()>,
    bell: Condvar,
}

impl Word {
    pub(crate) const fn new(value: u32) -> Self {
        Self {
            first: value,
            made: OnceLock::new(),
        }
    }

    fn made(&self) -> &Made {
        self.made.get_or_init(|| Made {
            value: AtomicU32::new(self.first),
            sleepers: Mutex::new(()),
            bell: Condvar::new(),
        })
    }

    pub(crate) fn wait(&self, expected: u32, _: Option<Duration>) {
        let made = self.made();
        let sleepers = made.sleepers.lock().unwrap();
        if made.value.load(Ordering::Relaxed) == expected {
            drop(made.bell.wait(sleepers));
        }
    }

    pub(crate) fn wake(&self, threads: u32) {
        let made = self.made();
        let _sleepers = made.sleepers.lock().unwrap();
        match threads {
            1 => made.bell.notify_one(),
            _ => made.bell.notify_all(),
        }
    }
}

impl Deref for Word {
    type Target = AtomicU32;
    fn deref(&self) -> &AtomicU32 {
        &self.made().value
    }
}
