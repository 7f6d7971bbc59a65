//! Choosing capacity for an offer: what is free, and what of it is taken.

#![forbid(unsafe_code)]

use super::State;
use super::fabric::{AddPolicy, AddRequest, FabricError};
use crate::address::DpaRange;
use crate::extent::Extent;
use crate::region::DcRegion;

impl State {
    /// The extents that a request comes to, none of them taken yet.
    pub(super) fn select(&self, request: &AddRequest) -> Result<Vec<Extent>, FabricError> {
        let region = self.region(request.region)?;
        let sharable = self.capacity.is_sharable(&region);
        if sharable && request.tag.is_null() {
            return Err(FabricError::TagNeeded {
                region: region.index,
            });
        }
        let mut free = self.free(&region);
        let ranges = match &request.policy {
            AddPolicy::Free(lens) => take_any(&mut free, lens, &region)?,
            AddPolicy::Contiguous(lens) => take_contiguous(&mut free, lens, &region)?,
            AddPolicy::Prescriptive(ranges) => take_these(&mut free, ranges, &region)?,
            AddPolicy::EnableSharedAccess => Vec::new(),
        };
        if ranges.is_empty() {
            return Err(FabricError::Empty);
        }
        let number = |place: usize| if sharable { place as u16 } else { 0 };
        let extents = ranges.into_iter().enumerate().map(|(place, range)| Extent {
            range,
            tag: request.tag,
            shared_seq: number(place),
        });
        Ok(extents.collect())
    }

    /// What nobody has of a region, in rising order.
    fn free(&self, region: &DcRegion) -> Vec<DpaRange> {
        let mut free = vec![region.range()];
        for taken in self.capacity.taken() {
            free = free
                .iter()
                .flat_map(|hole| hole.subtract(&taken.range))
                .flatten()
                .collect();
        }
        free
    }
}

fn check_len(len: u64, region: &DcRegion) -> Result<(), FabricError> {
    let block_size = region.block_size;
    match len {
        0 => Err(FabricError::Empty),
        _ if !len.is_multiple_of(block_size) => Err(FabricError::Misaligned { len, block_size }),
        _ => Ok(()),
    }
}

/// Takes `len` bytes off the start of the hole at `index`.
fn take_from(free: &mut Vec<DpaRange>, index: usize, len: u64) -> DpaRange {
    let hole = free[index];
    let taken = DpaRange {
        start: hole.start,
        len: len.min(hole.len),
    };
    match hole.subtract(&taken)[1] {
        Some(rest) => free[index] = rest,
        None => drop(free.remove(index)),
    }
    taken
}

fn take_contiguous(
    free: &mut Vec<DpaRange>,
    lens: &[u64],
    region: &DcRegion,
) -> Result<Vec<DpaRange>, FabricError> {
    let take = |len: &u64| {
        check_len(*len, region)?;
        let Some(index) = free.iter().position(|hole| hole.len >= *len) else {
            let available = free.iter().map(|hole| hole.len).max().unwrap_or(0);
            return Err(FabricError::NoCapacity {
                wanted: *len,
                available,
            });
        };
        Ok(take_from(free, index, *len))
    };
    lens.iter().map(take).collect()
}

fn take_any(
    free: &mut Vec<DpaRange>,
    lens: &[u64],
    region: &DcRegion,
) -> Result<Vec<DpaRange>, FabricError> {
    let available = free.iter().map(|hole| hole.len).sum();
    let wanted = lens
        .iter()
        .fold(0, |sum: u64, len| sum.saturating_add(*len));
    let mut taken = Vec::new();
    for len in lens {
        check_len(*len, region)?;
        let mut rest = *len;
        while rest > 0 {
            let whole = free.iter().position(|hole| hole.len >= rest);
            if free.is_empty() {
                return Err(FabricError::NoCapacity { wanted, available });
            }
            let range = take_from(free, whole.unwrap_or(0), rest);
            rest -= range.len;
            taken.push(range);
        }
    }
    Ok(taken)
}

fn take_these(
    free: &mut Vec<DpaRange>,
    ranges: &[DpaRange],
    region: &DcRegion,
) -> Result<Vec<DpaRange>, FabricError> {
    for &range in ranges {
        if DpaRange::new(range.start, range.len).is_none()
            || range.is_empty()
            || !region.range().contains(&range)
            || !range.is_aligned(region.base, region.block_size)
        {
            return Err(FabricError::NotInRegion {
                range,
                region: region.index,
                block_size: region.block_size,
            });
        }
        let Some(index) = free.iter().position(|hole| hole.contains(&range)) else {
            return Err(FabricError::NotFree { range });
        };
        let hole = free.remove(index);
        free.extend(hole.subtract(&range).into_iter().flatten());
    }
    Ok(ranges.to_vec())
}
