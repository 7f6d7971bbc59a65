//! Which granules of the window this process has, for a broker that has lost
//! the connection and asks: a bit each, in a mapping of its own, because it is
//! written while `malloc` runs. Other sets of granules are kept so as well.

use core::ptr::{NonNull, null_mut};
use core::sync::atomic::{AtomicU64, Ordering};

use dax_backend::broker::GRANULE;
use dax_backend::broker::protocol::WindowRange;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

/// The bits. Never unmapped: a source lives as long as its process.
pub(crate) struct Leases {
    words: NonNull<AtomicU64>,
    granules: usize,
}

// SAFETY: the words are atomics, and stay where they are.
unsafe impl Send for Leases {}
// SAFETY: as above.
unsafe impl Sync for Leases {}

impl Leases {
    /// None yet, of a window of `len` bytes.
    pub(crate) fn new(len: u64) -> Result<Self, Errno> {
        let granules = (len / GRANULE) as usize;
        let bytes = (granules.div_ceil(64) * 8).max(8);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            mmap_anonymous(
                null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        Ok(Self {
            words: NonNull::new(address.cast()).ok_or(Errno::FAULT)?,
            granules,
        })
    }

    fn word(&self, index: usize) -> (&AtomicU64, u64) {
        // SAFETY: callers stay below `granules`, for which there are words.
        let word = unsafe { self.words.add(index / 64).as_ref() };
        (word, 1 << (index % 64))
    }

    fn each(&self, range: WindowRange) -> core::ops::Range<usize> {
        let end = (range.end() / GRANULE).min(self.granules as u64);
        (range.offset / GRANULE) as usize..end as usize
    }

    /// Notes that `range` is leased.
    pub(crate) fn add(&self, range: WindowRange) {
        for index in self.each(range) {
            let (word, bit) = self.word(index);
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Notes that `range` is given back.
    pub(crate) fn remove(&self, range: WindowRange) {
        for index in self.each(range) {
            let (word, bit) = self.word(index);
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// Keeps what is in `other` too.
    pub(crate) fn keep(&self, other: &Self) {
        for index in (0..self.granules.min(other.granules)).step_by(64) {
            let (theirs, _) = other.word(index);
            let (word, _) = self.word(index);
            word.fetch_and(theirs.load(Ordering::Acquire), Ordering::AcqRel);
        }
    }

    /// None any more.
    pub(crate) fn clear(&self) {
        for index in (0..self.granules).step_by(64) {
            self.word(index).0.store(0, Ordering::Release);
        }
    }

    /// What is leased, run by run.
    pub(crate) fn runs(&self) -> impl Iterator<Item = WindowRange> {
        let leased = |index: usize| {
            let (word, bit) = self.word(index);
            word.load(Ordering::Acquire) & bit != 0
        };
        let mut next = 0;
        core::iter::from_fn(move || {
            let first = (next..self.granules).find(|index| leased(*index))?;
            let end = (first..self.granules).find(|index| !leased(*index));
            next = end.unwrap_or(self.granules);
            Some(WindowRange {
                offset: first as u64 * GRANULE,
                len: (next - first) as u64 * GRANULE,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u64, count: u64) -> WindowRange {
        WindowRange {
            offset: first * GRANULE,
            len: count * GRANULE,
        }
    }

    #[test]
    fn runs_are_what_was_added_and_not_removed() {
        let leases = Leases::new(130 * GRANULE).unwrap();
        assert_eq!(leases.runs().count(), 0);
        leases.add(range(3, 4));
        leases.add(range(62, 68));
        leases.remove(range(5, 1));
        leases.remove(range(70, 50));
        let runs: Vec<_> = leases.runs().collect();
        let wanted = [range(3, 2), range(6, 1), range(62, 8), range(120, 10)];
        assert_eq!(runs, wanted);
        let others = Leases::new(130 * GRANULE).unwrap();
        others.add(range(4, 60));
        others.add(range(128, 2));
        leases.keep(&others);
        let wanted = [range(4, 1), range(6, 1), range(62, 2), range(128, 2)];
        assert!(leases.runs().eq(wanted));
        leases.clear();
        assert_eq!(leases.runs().count(), 0);
    }
}
