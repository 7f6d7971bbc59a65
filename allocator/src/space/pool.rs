//! Granules that are leased and not mapped yet: a bitmap over the window.
//!
//! The lowest offset goes out first, so that neighbours in the window become
//! neighbours in the address space and the kernel keeps them in one mapping.

use crate::source::{Ranges, WindowRange};
use crate::space::granule::GRANULE;

pub(super) struct Pool {
    words: *mut u64,
    len: usize,
    count: usize,
    /// No granule of the pool lies in a word below this one.
    first: usize,
}

// SAFETY: the table behind `words` belongs to this pool alone, which is only
// reached through the lock of its space.
unsafe impl Send for Pool {}

impl Pool {
    pub(super) const NEW: Self = Self {
        words: core::ptr::null_mut(),
        len: 0,
        count: 0,
        first: 0,
    };

    /// Bytes of table that a window of `granules` needs.
    pub(super) const fn table_bytes(granules: usize) -> usize {
        granules.div_ceil(64) * 8
    }

    /// # Safety
    /// `table` is zeroed, 8-byte aligned memory of [`Pool::table_bytes`] bytes
    /// that nobody else uses, for ever.
    pub(super) unsafe fn open(&mut self, table: usize, granules: usize) {
        *self = Self {
            words: table as *mut u64,
            len: granules.div_ceil(64),
            count: 0,
            first: 0,
        };
    }

    fn words(&mut self) -> &mut [u64] {
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: `open` got a table of `len` words for this pool alone.
        unsafe { core::slice::from_raw_parts_mut(self.words, self.len) }
    }

    /// How many granules it holds.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// How many it holds inside `wanted`; all, if that is empty.
    pub(super) fn count_in(&mut self, wanted: &[WindowRange]) -> usize {
        let has = |words: &[u64], index: usize| words[index / 64] & 1 << (index % 64) != 0;
        let all = self.len * 64;
        let words = self.words();
        (0..all)
            .filter(|&index| has(words, index) && wants(wanted, (index * GRANULE) as u64))
            .count()
    }

    /// Adds the granule at `offset`. `false`: it is there already, or lies
    /// outside the window.
    pub(super) fn put(&mut self, offset: u64) -> bool {
        let index = (offset as usize) / GRANULE;
        let Some(word) = self.words().get_mut(index / 64) else {
            return false;
        };
        let bit = 1u64 << (index % 64);
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.count += 1;
        self.first = self.first.min(index / 64);
        true
    }

    /// Takes the granule with the lowest offset.
    pub(super) fn take(&mut self) -> Option<u64> {
        if self.count == 0 {
            return None;
        }
        let from = self.first;
        let index = from + self.words()[from..].iter().position(|w| *w != 0)?;
        self.first = index;
        let word = &mut self.words()[index];
        let bit = word.trailing_zeros() as usize;
        *word &= *word - 1;
        self.count -= 1;
        Some(((index * 64 + bit) * GRANULE) as u64)
    }

    /// Takes the first granule that is not inside `recalled`; any inside it
    /// (all, if that is empty) stays.
    pub(super) fn take_outside(&mut self, recalled: &[WindowRange]) -> Option<u64> {
        if recalled.is_empty() {
            return None;
        }
        let mut index = self.first * 64;
        while index < self.len * 64 {
            let (word, bit) = (index / 64, 1u64 << (index % 64));
            let offset = (index * GRANULE) as u64;
            if self.words()[word] & bit != 0 && !wants(recalled, offset) {
                self.words()[word] &= !bit;
                self.count -= 1;
                return Some(offset);
            }
            index += 1;
        }
        None
    }

    /// Takes up to `granules` of those inside `wanted` (all, if that is
    /// empty) and adds them to `out` as far as it has room.
    pub(super) fn drain(
        &mut self,
        granules: usize,
        wanted: &[WindowRange],
        out: &mut Ranges,
    ) -> usize {
        let mut taken = 0;
        for index in 0..self.len * 64 {
            let (word, bit) = (index / 64, 1u64 << (index % 64));
            if taken == granules || self.count == 0 {
                break;
            }
            let range = WindowRange {
                offset: (index * GRANULE) as u64,
                len: GRANULE as u64,
            };
            if self.words()[word] & bit == 0 || !wants(wanted, range.offset) {
                continue;
            }
            if !out.push(range) {
                break;
            }
            self.words()[word] &= !bit;
            self.count -= 1;
            taken += 1;
        }
        taken
    }
}

/// Whether a recall that names `wanted` means the granule at `offset`.
pub(super) fn wants(wanted: &[WindowRange], offset: u64) -> bool {
    wanted.is_empty()
        || wanted
            .iter()
            .any(|r| offset >= r.offset && offset - r.offset < r.len)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(granules: usize) -> Pool {
        let table = vec![0u64; Pool::table_bytes(granules) / 8].leak();
        let mut pool = Pool::NEW;
        // SAFETY: leaked, zeroed, of the right size.
        unsafe { pool.open(table.as_mut_ptr() as usize, granules) };
        pool
    }

    #[test]
    fn lowest_offset_goes_out_first() {
        let mut pool = pool(200);
        for index in [150u64, 3, 70] {
            assert!(pool.put(index * GRANULE as u64));
        }
        assert!(!pool.put(3 * GRANULE as u64), "twice");
        assert!(!pool.put(256 * GRANULE as u64), "outside the window");
        let order: Vec<_> = core::iter::from_fn(|| pool.take())
            .map(|o| o / GRANULE as u64)
            .collect();
        assert_eq!(order, [3, 70, 150]);
        assert_eq!(pool.count(), 0);
    }

    #[test]
    fn drain_takes_only_what_is_wanted() {
        let mut pool = pool(64);
        for index in 0..10u64 {
            pool.put(index * GRANULE as u64);
        }
        let wanted = [WindowRange {
            offset: 4 * GRANULE as u64,
            len: 3 * GRANULE as u64,
        }];
        let mut out = Ranges::EMPTY;
        assert_eq!(pool.drain(usize::MAX, &wanted, &mut out), 3);
        assert_eq!(out.as_slice(), wanted);
        assert_eq!(pool.drain(2, &[], &mut out), 2);
        assert_eq!(pool.count(), 5);
    }
}
