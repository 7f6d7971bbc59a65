//! Addresses of the device and of the host, and ranges of device addresses.
//!
//! Everything the device says is checked: a range whose end does not fit in 64
//! bits cannot be built, so the arithmetic after that never wraps.

#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

/// A device physical address: a byte offset into the device's own memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Dpa(pub u64);

/// A host physical address: what a processor issues, decoded to a [`Dpa`] by HDM decoders.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hpa(pub u64);

impl fmt::Display for Dpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DPA {:#x}", self.0)
    }
}

impl fmt::Debug for Dpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dpa({:#x})", self.0)
    }
}

impl fmt::Display for Hpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HPA {:#x}", self.0)
    }
}

impl fmt::Debug for Hpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hpa({:#x})", self.0)
    }
}

/// `len` bytes of device memory from `start`.
///
/// [`DpaRange::new`] refuses ranges that wrap. The fields are public because ranges
/// are plain data; whoever fills them in by hand answers for `start + len`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct DpaRange {
    /// First byte.
    pub start: Dpa,
    /// Length in bytes; may be 0.
    pub len: u64,
}

impl DpaRange {
    /// A range, or `None` if its end does not fit in 64 bits.
    pub const fn new(start: Dpa, len: u64) -> Option<Self> {
        match start.0.checked_add(len) {
            Some(_) => Some(Self { start, len }),
            None => None,
        }
    }

    /// The range from `start` up to, not including, `end`; `None` if `end` lies before `start`.
    pub const fn between(start: Dpa, end: Dpa) -> Option<Self> {
        match end.0.checked_sub(start.0) {
            Some(len) => Some(Self { start, len }),
            None => None,
        }
    }

    /// First address behind the range.
    pub const fn end(&self) -> Dpa {
        Dpa(self.start.0.saturating_add(self.len))
    }

    /// Whether it has no bytes.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether every byte of `other` is in this range.
    pub fn contains(&self, other: &Self) -> bool {
        self.start <= other.start && other.end() <= self.end()
    }

    /// Whether the byte at `dpa` is in this range.
    pub fn contains_address(&self, dpa: Dpa) -> bool {
        self.start <= dpa && dpa < self.end()
    }

    /// Whether the two share at least one byte.
    pub fn intersects(&self, other: &Self) -> bool {
        self.start.max(other.start) < self.end().min(other.end())
    }

    /// The bytes that both have, or `None` if there are none.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self {
            start,
            len: end.0 - start.0,
        })
    }

    /// What is left of this range without `other`: the piece below and the piece above.
    pub fn subtract(&self, other: &Self) -> [Option<Self>; 2] {
        let Some(cut) = self.intersection(other) else {
            return [(!self.is_empty()).then_some(*self), None];
        };
        let piece = |from: Dpa, to: Dpa| Self::between(from, to).filter(|piece| !piece.is_empty());
        [piece(self.start, cut.start), piece(cut.end(), self.end())]
    }

    /// What is left of `ranges` without this one.
    pub(crate) fn cut_from(&self, ranges: &[Self]) -> Vec<Self> {
        let pieces = ranges.iter().flat_map(|range| range.subtract(self));
        pieces.flatten().collect()
    }

    /// Whether start, counted from `base`, and length are multiples of `block`.
    pub fn is_aligned(&self, base: Dpa, block: u64) -> bool {
        block != 0
            && self.start.0.wrapping_sub(base.0).is_multiple_of(block)
            && self.len.is_multiple_of(block)
    }

    /// Sorts `ranges` and joins those that touch or overlap.
    pub fn coalesce(ranges: &mut Vec<Self>) {
        ranges.retain(|range| !range.is_empty());
        ranges.sort_unstable();
        ranges.dedup_by(|next, kept| {
            let joins = next.start <= kept.end();
            if joins {
                let end = kept.end().max(next.end());
                kept.len = end.0 - kept.start.0;
            }
            joins
        });
    }
}

impl fmt::Display for DpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DPA {:#x}+{:#x}", self.start.0, self.len)
    }
}

impl fmt::Debug for DpaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DpaRange({:#x}+{:#x})", self.start.0, self.len)
    }
}

/// Host addresses that reach the device: a fixed memory window of the platform, or a part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HpaWindow {
    /// First host address; a multiple of 256 MiB.
    pub base: Hpa,
    /// Length in bytes; a multiple of 256 MiB.
    pub len: u64,
}

impl HpaWindow {
    /// First address behind the window.
    pub const fn end(&self) -> Hpa {
        Hpa(self.base.0.saturating_add(self.len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> DpaRange {
        DpaRange::new(Dpa(start), len).unwrap()
    }

    #[test]
    fn a_range_that_wraps_is_refused() {
        assert_eq!(DpaRange::new(Dpa(u64::MAX), 2), None);
        assert_eq!(
            DpaRange::new(Dpa(u64::MAX - 1), 1).unwrap().end(),
            Dpa(u64::MAX)
        );
    }

    #[test]
    fn empty_ranges_intersect_nothing() {
        assert!(!range(10, 0).intersects(&range(0, 100)));
        assert!(!range(0, 10).intersects(&range(10, 10)));
        assert!(range(0, 11).intersects(&range(10, 10)));
    }

    #[test]
    fn subtracting_the_middle_leaves_two_pieces() {
        let all = range(0x100, 0x100);
        assert_eq!(
            all.subtract(&range(0x140, 0x40)),
            [Some(range(0x100, 0x40)), Some(range(0x180, 0x80))]
        );
        assert_eq!(all.subtract(&range(0, 0x1000)), [None, None]);
        assert_eq!(all.subtract(&range(0x200, 1)), [Some(all), None]);
        assert_eq!(
            all.subtract(&range(0, 0x180)),
            [None, Some(range(0x180, 0x80))]
        );
    }

    #[test]
    fn coalescing_joins_neighbours_and_drops_empty_ranges() {
        let mut ranges = vec![
            range(30, 10),
            range(0, 10),
            range(10, 10),
            range(5, 0),
            range(35, 10),
        ];
        DpaRange::coalesce(&mut ranges);
        assert_eq!(ranges, [range(0, 20), range(30, 15)]);
    }

    #[test]
    fn alignment_counts_from_the_region_base() {
        assert!(range(0x300, 0x200).is_aligned(Dpa(0x100), 0x200));
        assert!(!range(0x300, 0x200).is_aligned(Dpa(0), 0x200));
        assert!(!range(0x300, 0x200).is_aligned(Dpa(0x300), 0));
    }
}
