//! Which pages of a granule hold something.
#![forbid(unsafe_code)]

use super::{GRANULE, PAGE};
use core::ops::Range;

const PAGES: usize = GRANULE / PAGE;

/// A bit per 4 KiB page of a granule, lowest address first; set: live, and
/// copied by a rebind. What a page that is not live reads afterwards is
/// undefined.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LivePages(pub [u64; PAGES / 64]);

impl LivePages {
    /// Every page.
    pub const ALL: Self = Self([!0; PAGES / 64]);

    /// How many pages are live.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// The live pages as maximal runs of page numbers.
    pub fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let mut from = 0;
        core::iter::from_fn(move || {
            let start = self.next(from, true)?;
            from = self.next(start, false).unwrap_or(PAGES);
            Some(start..from)
        })
    }

    /// The first page from `from` on that is live, or that is not.
    fn next(&self, from: usize, live: bool) -> Option<usize> {
        let mut page = from;
        while page < PAGES {
            let word = if live {
                self.0[page / 64]
            } else {
                !self.0[page / 64]
            };
            match word >> (page % 64) {
                0 => page = (page / 64 + 1) * 64,
                rest => return Some(page + rest.trailing_zeros() as usize),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(pages: &[usize]) -> LivePages {
        let mut live = LivePages([0; 8]);
        for page in pages {
            live.0[page / 64] |= 1 << (page % 64);
        }
        live
    }

    #[test]
    fn runs_join_neighbours_across_words_and_cover_just_the_live_pages() {
        assert_eq!(live(&[]).runs().count(), 0);
        assert!(LivePages::ALL.runs().eq(core::iter::once(0..512)));
        let mixed = live(&[0, 1, 63, 64, 65, 300, 511]);
        assert!(mixed.runs().eq([0..2, 63..66, 300..301, 511..512]));
        assert_eq!(live(&[0, 63, 64, 511]).count(), 4);
    }
}
