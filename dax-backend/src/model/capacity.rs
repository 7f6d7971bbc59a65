//! The device's dynamic capacity: what is offered, what is accepted, and the rules between.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;

use super::audit::{AnswerAudit, Audit};
use super::memory::Memory;
use crate::address::DpaRange;
use crate::cmd::ReturnCode;
use crate::extent::{Extent, ExtentTag};
use crate::region::DcRegion;

/// A group that the host has not answered yet.
struct PendingGroup {
    number: u64,
    extents: Vec<Extent>,
    /// Shared with a host that has it already: all or nothing.
    whole: bool,
}

/// Capacity that another host holds under a tag, which this host may come to share.
struct SharedTag {
    tag: ExtentTag,
    extents: Vec<Extent>,
}

pub(super) struct Capacity {
    regions: Vec<DcRegion>,
    sharable: Vec<bool>,
    max_extents: usize,
    /// See [`ModelConfig::qemu_quirks`](super::ModelConfig::qemu_quirks).
    quirks: bool,
    memory: Arc<Memory>,
    pending: VecDeque<PendingGroup>,
    groups: u64,
    /// Ranges of an answer whose last command has not come yet.
    partial: Vec<DpaRange>,
    accepted: Vec<Extent>,
    shared: Vec<SharedTag>,
    generation: u32,
}

impl Capacity {
    pub(super) fn new(
        regions: Vec<DcRegion>,
        sharable: Vec<bool>,
        max_extents: usize,
        quirks: bool,
        memory: Arc<Memory>,
    ) -> Self {
        Self {
            regions,
            sharable,
            max_extents,
            quirks,
            memory,
            pending: VecDeque::new(),
            groups: 0,
            partial: Vec::new(),
            accepted: Vec::new(),
            shared: Vec::new(),
            generation: 0,
        }
    }

    pub(super) fn regions(&self) -> &[DcRegion] {
        &self.regions
    }

    pub(super) fn is_sharable(&self, region: &DcRegion) -> bool {
        self.sharable[usize::from(region.index)]
    }

    pub(super) fn accepted(&self) -> &[Extent] {
        &self.accepted
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    pub(super) fn change_generation(&mut self) {
        if !self.quirks {
            self.generation = self.generation.wrapping_add(1);
        }
    }

    pub(super) fn max_extents(&self) -> usize {
        self.max_extents
    }

    pub(super) fn pending_groups(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn pending_extents(&self) -> impl Iterator<Item = &Extent> {
        self.pending.iter().flat_map(|group| &group.extents)
    }

    pub(super) fn forget_partial_answer(&mut self) {
        self.partial.clear();
    }

    /// Everything that is not free, in no order.
    pub(super) fn taken(&self) -> impl Iterator<Item = &Extent> {
        let elsewhere = self.shared.iter().flat_map(|shared| &shared.extents);
        self.accepted
            .iter()
            .chain(self.pending_extents())
            .chain(elsewhere)
    }

    /// Puts an offer at the end of the queue.
    pub(super) fn offer(&mut self, extents: Vec<Extent>, whole: bool) {
        self.pending.push_back(PendingGroup {
            number: self.groups,
            extents,
            whole,
        });
        self.groups += 1;
    }

    /// Gives extents to another host under a tag.
    pub(super) fn give_elsewhere(&mut self, tag: ExtentTag, extents: Vec<Extent>) {
        self.shared.push(SharedTag { tag, extents });
    }

    pub(super) fn shared_with(&self, tag: ExtentTag) -> Option<&[Extent]> {
        let shared = self.shared.iter().find(|shared| shared.tag == tag)?;
        Some(&shared.extents)
    }

    pub(super) fn set_block_size(&mut self, region: usize, block_size: u64) {
        self.regions[region].block_size = block_size;
    }

    /// Add Dynamic Capacity Response, 4802h.
    pub(super) fn answer(
        &mut self,
        ranges: &[DpaRange],
        more: bool,
        audit: &mut Audit,
    ) -> Result<(), ReturnCode> {
        let group = self.pending.front().map(|group| group.number);
        let result = if self.quirks {
            self.answer_whole(ranges, audit)
        } else {
            self.partial.extend_from_slice(ranges);
            if more {
                self.check_answer(&self.partial, audit).map(drop)
            } else {
                let all = std::mem::take(&mut self.partial);
                self.answer_whole(&all, audit)
            }
        };
        if result.is_err() {
            self.partial.clear();
        }
        if group.is_none() {
            audit.spurious_answers += 1;
        }
        audit.answers.push(AnswerAudit {
            group,
            ranges: ranges.len(),
            more,
            code: result.err().unwrap_or(ReturnCode::Success).into(),
        });
        result
    }

    fn answer_whole(&mut self, ranges: &[DpaRange], audit: &mut Audit) -> Result<(), ReturnCode> {
        let extents = self.check_answer(ranges, audit)?;
        self.pending.pop_front();
        if !extents.is_empty() {
            let kept = |extent: Extent| match self.quirks {
                true => Extent::untagged(extent.range),
                false => extent,
            };
            self.accepted.extend(extents.into_iter().map(kept));
            self.change_generation();
        }
        Ok(())
    }

    /// The extents that an answer would accept, or what the device says to it. Nothing changes.
    fn check_answer(
        &self,
        ranges: &[DpaRange],
        audit: &mut Audit,
    ) -> Result<Vec<Extent>, ReturnCode> {
        let Some(group) = self.pending.front() else {
            let empty = ranges.is_empty();
            return Err(if empty {
                ReturnCode::InvalidInput
            } else {
                ReturnCode::InvalidPhysicalAddress
            });
        };
        if ranges.len() + self.accepted.len() > self.max_extents {
            return Err(ReturnCode::ResourcesExhausted);
        }
        self.check_list(ranges)?;
        let mut accepted = Vec::with_capacity(ranges.len());
        let mut last = 0;
        for range in ranges {
            let within = |extent: &Extent| extent.range.contains(range);
            let Some(index) = group.extents.iter().position(within) else {
                if self.pending_extents().any(within) {
                    audit.answers_out_of_order += 1;
                    if !self.quirks {
                        return Err(ReturnCode::InvalidInput);
                    }
                }
                return Err(ReturnCode::InvalidPhysicalAddress);
            };
            if index < last {
                audit.answers_out_of_order += 1;
                return Err(ReturnCode::InvalidInput);
            }
            last = index;
            if self
                .accepted
                .iter()
                .any(|extent| extent.range.intersects(range))
            {
                return Err(ReturnCode::InvalidPhysicalAddress);
            }
            accepted.push(Extent {
                range: *range,
                ..group.extents[index]
            });
        }
        if group.whole && !accepted.is_empty() && accepted != group.extents {
            return Err(ReturnCode::InvalidInput);
        }
        Ok(accepted)
    }

    /// Release Dynamic Capacity, 4803h.
    pub(super) fn release(
        &mut self,
        ranges: &[DpaRange],
        audit: &mut Audit,
    ) -> Result<(), ReturnCode> {
        audit.releases.push(ranges.len());
        if ranges.is_empty() {
            return Err(ReturnCode::InvalidInput);
        }
        self.check_list(ranges)?;
        for range in ranges {
            let held = self
                .accepted
                .iter()
                .filter_map(|extent| extent.range.intersection(range));
            if held.map(|piece| piece.len).sum::<u64>() != range.len {
                if self
                    .pending_extents()
                    .any(|extent| extent.range.intersects(range))
                {
                    audit.releases_of_pending += 1;
                }
                return Err(ReturnCode::InvalidPhysicalAddress);
            }
        }
        let left = without(&self.accepted, ranges);
        if left.len() > self.max_extents {
            return Err(ReturnCode::ResourcesExhausted);
        }
        self.take_back(left, ranges);
        Ok(())
    }

    /// Takes accepted ranges away without asking.
    pub(super) fn force(&mut self, ranges: &[DpaRange]) {
        self.take_back(without(&self.accepted, ranges), ranges);
    }

    fn take_back(&mut self, left: Vec<Extent>, ranges: &[DpaRange]) {
        self.accepted = left;
        self.change_generation();
        for range in ranges {
            let region = self
                .regions
                .iter()
                .find(|region| region.range().contains(range));
            if region.is_some_and(|region| region.sanitizes) {
                self.memory.zero(range);
            }
        }
    }

    /// Ranges within one region, in whole blocks, disjoint.
    fn check_list(&self, ranges: &[DpaRange]) -> Result<(), ReturnCode> {
        for (index, range) in ranges.iter().enumerate() {
            let region = self.regions.iter().find(|region| {
                DpaRange::new(range.start, range.len).is_some() && region.range().contains(range)
            });
            let Some(region) = region else {
                return Err(ReturnCode::InvalidPhysicalAddress);
            };
            if range.is_empty()
                || !range.is_aligned(region.base, region.block_size)
                || ranges[..index].iter().any(|other| other.intersects(range))
            {
                return Err(ReturnCode::InvalidExtentList);
            }
        }
        Ok(())
    }
}

/// The extents without the ranges. As on QEMU, what is left of a split one goes to the end.
fn without(extents: &[Extent], ranges: &[DpaRange]) -> Vec<Extent> {
    let mut left = extents.to_vec();
    for cut in ranges {
        let (hit, mut kept): (Vec<Extent>, Vec<Extent>) = left
            .into_iter()
            .partition(|extent| extent.range.intersects(cut));
        for extent in hit {
            let pieces = extent.range.subtract(cut).into_iter().flatten();
            kept.extend(pieces.map(|range| Extent { range, ..extent }));
        }
        left = kept;
    }
    left
}
