//! One bit for each 4 KiB page of a granule.
#![forbid(unsafe_code)]

use super::PAGES_PER_GRANULE;

const WORDS: usize = PAGES_PER_GRANULE / 64;

/// A set of the pages of one granule (512 pages of 4 KiB).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageMap([u64; WORDS]);

impl PageMap {
    /// No page.
    pub const EMPTY: Self = Self([0; WORDS]);
    /// All 512 pages.
    pub const FULL: Self = Self([u64::MAX; WORDS]);

    /// The set whose raw words are these.
    pub fn from_words(words: [u64; WORDS]) -> Self {
        Self(words)
    }

    /// The raw words, page 0 in bit 0 of word 0.
    pub fn words(&self) -> &[u64; WORDS] {
        &self.0
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|w| w.count_ones()).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&w| w == 0)
    }

    /// Puts pages `start..start + len` in.
    pub fn insert(&mut self, start: usize, len: usize) {
        self.for_each_word(start, len, |word, mask| *word |= mask);
    }

    /// Takes pages `start..start + len` out.
    pub fn remove(&mut self, start: usize, len: usize) {
        self.for_each_word(start, len, |word, mask| *word &= !mask);
    }

    /// Whether all of `start..start + len` are in.
    pub fn contains(&self, start: usize, len: usize) -> bool {
        let mut all = true;
        let mut copy = *self;
        copy.for_each_word(start, len, |word, mask| all &= *word & mask == mask);
        all
    }

    /// Whether any of `start..start + len` is in.
    pub fn intersects(&self, start: usize, len: usize) -> bool {
        let mut any = false;
        let mut copy = *self;
        copy.for_each_word(start, len, |word, mask| any |= *word & mask != 0);
        any
    }

    /// Of the runs of pages that are *not* in the set, the shortest that holds
    /// `len` pages from a multiple of `align` (a power of two) on: where those
    /// begin, and how long the whole run is. The first of several.
    pub fn tightest_gap(&self, len: usize, align: usize) -> Option<(usize, usize)> {
        let mut best: Option<(usize, usize)> = None;
        let mut at = 0;
        while at + len <= PAGES_PER_GRANULE {
            let start = self.next_clear(at);
            let end = self.next_set(start);
            let aligned = start.next_multiple_of(align);
            let gap = end - start;
            if aligned + len <= end && best.is_none_or(|(_, shortest)| gap < shortest) {
                best = Some((aligned, gap));
                if gap == len {
                    break;
                }
            }
            at = end + 1;
        }
        best
    }

    /// The length of the longest run of pages that are not in the set.
    pub fn longest_gap(&self) -> usize {
        let (mut at, mut longest) = (0, 0);
        while at < PAGES_PER_GRANULE {
            let start = self.next_clear(at);
            let end = self.next_set(start);
            longest = longest.max(end - start);
            at = end + 1;
        }
        longest
    }

    /// How many pages at the end are not in the set.
    pub fn free_end(&self) -> usize {
        let last = self.0.iter().rposition(|&word| word != 0);
        last.map_or(PAGES_PER_GRANULE, |word| {
            (WORDS - 1 - word) * 64 + self.0[word].leading_zeros() as usize
        })
    }

    /// How many pages at the start are not in the set.
    pub fn free_start(&self) -> usize {
        self.next_set(0)
    }

    fn next_clear(&self, from: usize) -> usize {
        self.next(from, u64::MAX)
    }

    fn next_set(&self, from: usize) -> usize {
        self.next(from, 0)
    }

    /// First page at or after `from` whose bit differs from `flip`'s; 512 if none.
    fn next(&self, from: usize, flip: u64) -> usize {
        let mut word = from / 64;
        let mut mask = u64::MAX << (from % 64);
        while word < WORDS {
            let bits = (self.0[word] ^ flip) & mask;
            if bits != 0 {
                return word * 64 + bits.trailing_zeros() as usize;
            }
            mask = u64::MAX;
            word += 1;
        }
        PAGES_PER_GRANULE
    }

    fn for_each_word(&mut self, start: usize, len: usize, mut f: impl FnMut(&mut u64, u64)) {
        debug_assert!(start + len <= PAGES_PER_GRANULE);
        let (mut at, end) = (start, start + len);
        while at < end {
            let bit = at % 64;
            let n = (64 - bit).min(end - at);
            f(&mut self.0[at / 64], (u64::MAX >> (64 - n)) << bit);
            at += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The obvious implementation the fast one is compared with.
    fn naive_first(taken: &[bool], len: usize, align: usize) -> Option<usize> {
        (0..=taken.len().saturating_sub(len))
            .step_by(align)
            .find(|&s| taken[s..s + len].iter().all(|t| !t))
    }

    fn naive_tightest(taken: &[bool], len: usize, align: usize) -> Option<(usize, usize)> {
        let free_from = |s: usize| taken[s..].iter().take_while(|t| !**t).count();
        (0..taken.len())
            .filter(|&s| !taken[s] && (s == 0 || taken[s - 1]))
            .filter(|&s| s.next_multiple_of(align) + len <= s + free_from(s))
            .map(|s| (s.next_multiple_of(align), free_from(s)))
            .min_by_key(|&(_, gap)| gap)
    }

    proptest! {
        #[test]
        fn agrees_with_a_vector_of_bools(
            ops in prop::collection::vec((any::<bool>(), 0usize..512, 1usize..512), 1..40),
            len in 1usize..=512, shift in 0u32..=9,
        ) {
            let mut map = PageMap::EMPTY;
            let mut naive = vec![false; PAGES_PER_GRANULE];
            for (insert, start, n) in ops {
                let n = n.min(PAGES_PER_GRANULE - start);
                if insert { map.insert(start, n) } else { map.remove(start, n) }
                naive[start..start + n].fill(insert);
                prop_assert_eq!(map.contains(start, n), insert);
                prop_assert_eq!(map.intersects(start, n), insert);
            }
            prop_assert_eq!(map.count() as usize, naive.iter().filter(|t| **t).count());
            prop_assert_eq!(map.tightest_gap(len, 1 << shift), naive_tightest(&naive, len, 1 << shift));
            let free = naive.iter().rev().take_while(|taken| !**taken).count();
            prop_assert_eq!(map.free_end(), free);
            let free = naive.iter().take_while(|taken| !**taken).count();
            prop_assert_eq!(map.free_start(), free);
            let longest = map.longest_gap();
            prop_assert!(longest == 0 || naive_first(&naive, longest, 1).is_some());
            prop_assert!(longest == 512 || naive_first(&naive, longest + 1, 1).is_none());
        }
    }
}
