//! Which ranges to offer, for a fabric manager that wants to be told (selection policy
//! "prescriptive", CXL r3.1 7.6.7.6.5).

#![forbid(unsafe_code)]

use super::OrchestratorError;
use crate::address::{Dpa, DpaRange};
use crate::extent::Extent;
use crate::region::DcRegion;

/// What is known of a device's capacity.
#[derive(Debug)]
pub(super) struct Choice {
    regions: Vec<DcRegion>,
    /// What the host holds.
    held: Vec<DpaRange>,
    /// Offered lately, and perhaps not answered yet; or refused as somebody's.
    taken: Vec<DpaRange>,
}

/// Ranges of one region.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chosen {
    /// The region.
    pub(super) region: DcRegion,
    /// One range for each size, in order.
    pub(super) ranges: Vec<DpaRange>,
}

impl Choice {
    pub(super) fn new(regions: &[DcRegion]) -> Self {
        Self {
            regions: regions.to_vec(),
            held: Vec::new(),
            taken: Vec::new(),
        }
    }

    /// The host's list is newer than what was offered before: what is not on it is free again,
    /// or will be said not to be.
    pub(super) fn held(&mut self, extents: &[Extent]) {
        self.held = extents.iter().map(|extent| extent.range).collect();
        self.taken.clear();
    }

    /// Not to be chosen again until the next list.
    pub(super) fn take(&mut self, ranges: &[DpaRange]) {
        self.taken.extend(ranges);
    }

    /// Free ranges of these sizes in the first region that has them.
    pub(super) fn choose(&self, sizes: &[u64]) -> Result<Chosen, OrchestratorError> {
        let fitting = self.regions.iter().find_map(|region| {
            let ranges = self.choose_in(region, sizes)?;
            let region = *region;
            Some(Chosen { region, ranges })
        });
        fitting.ok_or_else(|| OrchestratorError::NoCapacity {
            wanted: sizes.iter().fold(0, |sum, size| sum.saturating_add(*size)),
            available: self.regions.iter().map(|region| self.free_in(region)).sum(),
        })
    }

    /// The region that `range` lies in.
    pub(super) fn region_of(&self, range: &DpaRange) -> Result<DcRegion, OrchestratorError> {
        let region = self
            .regions
            .iter()
            .find(|region| region.range().contains(range));
        region.copied().ok_or_else(|| OrchestratorError::Refused {
            reason: format!("{range} lies in no DC region of the device"),
        })
    }

    /// The lowest gaps that are large enough.
    fn choose_in(&self, region: &DcRegion, sizes: &[u64]) -> Option<Vec<DpaRange>> {
        let mut chosen: Vec<DpaRange> = Vec::new();
        for size in sizes {
            let size = size.checked_next_multiple_of(region.block_size)?;
            let mut at = region.base;
            let range = loop {
                let range = DpaRange::new(at, size).filter(|r| region.range().contains(r))?;
                let others = self.held.iter().chain(&self.taken).chain(&chosen);
                match others
                    .filter(|other| other.intersects(&range))
                    .map(DpaRange::end)
                    .max()
                {
                    None => break range,
                    Some(end) => {
                        let offset =
                            (end.0 - region.base.0).checked_next_multiple_of(region.block_size)?;
                        at = Dpa(region.base.0.checked_add(offset)?);
                    }
                }
            };
            chosen.push(range);
        }
        Some(chosen)
    }

    fn free_in(&self, region: &DcRegion) -> u64 {
        let mut used: Vec<DpaRange> = self.held.iter().chain(&self.taken).copied().collect();
        DpaRange::coalesce(&mut used);
        let inside = used
            .iter()
            .filter_map(|range| range.intersection(&region.range()));
        region
            .len
            .saturating_sub(inside.map(|range| range.len).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::ExtentTag;

    const MIB: u64 = 1 << 20;

    fn region(index: u8, base: u64, len: u64) -> DcRegion {
        DcRegion {
            index,
            base: Dpa(base * MIB),
            decode_len: 256 * MIB,
            len: len * MIB,
            block_size: 2 * MIB,
            sanitizes: false,
            dsmad_handle: 0,
        }
    }

    fn range(start: u64, len: u64) -> DpaRange {
        DpaRange::new(Dpa(start * MIB), len * MIB).unwrap()
    }

    #[test]
    fn gaps_are_filled_from_below_and_one_region_has_all_of_a_group() {
        let mut choice = Choice::new(&[region(0, 0, 16), region(1, 256, 64)]);
        let of = |range| Extent {
            range,
            tag: ExtentTag::NULL,
            shared_seq: 0,
        };
        choice.held(&[of(range(2, 4)), of(range(8, 2))]);
        let chosen = |sizes: &[u64]| {
            let sizes: Vec<u64> = sizes.iter().map(|size| size * MIB).collect();
            choice
                .choose(&sizes)
                .map(|chosen| (chosen.region.index, chosen.ranges))
        };
        assert_eq!(
            chosen(&[2, 4, 2]).unwrap(),
            (0, vec![range(0, 2), range(10, 4), range(6, 2)])
        );
        // Rounded up to blocks; no longer in the first region.
        assert_eq!(
            chosen(&[8, 1]).unwrap(),
            (1, vec![range(256, 8), range(264, 2)])
        );
        let OrchestratorError::NoCapacity { wanted, available } = chosen(&[66]).unwrap_err() else {
            panic!()
        };
        assert_eq!((wanted, available), (66 * MIB, (10 + 64) * MIB));
        assert!(chosen(&[u64::MAX / MIB]).is_err());
        choice.take(&[range(0, 2), range(256, 60)]);
        assert!(choice.choose(&[8 * MIB]).is_err());
        choice.held(&[]);
        assert_eq!(choice.choose(&[8 * MIB]).unwrap().ranges, [range(0, 8)]);
        assert_eq!(choice.region_of(&range(256, 64)).unwrap().index, 1);
        assert!(choice.region_of(&range(14, 4)).is_err());
    }
}
