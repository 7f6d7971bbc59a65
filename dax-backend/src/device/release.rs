//! Capacity going back: asked for, taken by force, or given up.

#![forbid(unsafe_code)]

use super::DcDevice;
use crate::address::DpaRange;
use crate::capacity::DeviceEvent;
use crate::cmd::ReturnCode;
use crate::cmd::dynamic_capacity::{Release, ranges_per_command};
use crate::error::DeviceError;
use crate::extent::Extent;
use crate::mailbox::MailboxError;
use crate::mmio::Mmio;

impl<M: Mmio> DcDevice<M> {
    /// The device asks for an extent back. What of it is not held is none of our business: it
    /// was released meanwhile, or never accepted, and 4803h must not name it.
    pub(super) fn release_requested(&mut self, asked: &Extent) {
        let Some(range) = DpaRange::new(asked.range.start, asked.range.len) else {
            self.counters.releases_not_held += 1;
            return;
        };
        let mut wanted: Vec<DeviceEvent> = Vec::new();
        for held in self
            .accepted
            .iter()
            .filter(|held| held.range.intersects(&range))
        {
            let tag = held.tag;
            if tag.is_null() {
                let range = self.whole_blocks(held, &range);
                wanted.push(DeviceEvent::ReleaseRequested { range, tag });
            } else {
                let group = self.accepted.iter().filter(|extent| extent.tag == tag);
                wanted.extend(group.map(|extent| DeviceEvent::ReleaseRequested {
                    range: extent.range,
                    tag,
                }));
            }
        }
        if wanted.is_empty() {
            self.counters.releases_not_held += 1;
        }
        for event in wanted {
            // Each record of a tag group asks for the whole group.
            if !self.events.contains(&event) {
                self.events.push(event);
            }
        }
    }

    /// The part of a held extent that covers `range` in whole blocks.
    fn whole_blocks(&self, held: &Extent, range: &DpaRange) -> DpaRange {
        let Some(part) = held.range.intersection(range) else {
            return held.range;
        };
        let block = self
            .region_of(&held.range)
            .map_or(1, |region| region.block_size);
        let before = (part.start.0 - held.range.start.0) % block;
        let start = crate::address::Dpa(part.start.0 - before);
        let len = (part.len + before).next_multiple_of(block);
        let widened = DpaRange { start, len };
        widened.intersection(&held.range).unwrap_or(part)
    }

    /// An extent is gone; there is nothing to answer.
    pub(super) fn forced_release(&mut self, gone: &Extent) {
        let Some(range) = DpaRange::new(gone.range.start, gone.range.len) else {
            self.counters.releases_not_held += 1;
            return;
        };
        let lost: Vec<DeviceEvent> = self
            .accepted
            .iter()
            .filter_map(|held| {
                let range = held.range.intersection(&range)?;
                Some(DeviceEvent::ForcedRelease {
                    range,
                    tag: held.tag,
                })
            })
            .collect();
        if lost.is_empty() {
            self.counters.releases_not_held += 1;
        }
        self.counters.bytes_forced += self.forget(&[range]);
        self.events.extend(lost);
    }

    /// Gives ranges back with 4803h, in as many commands as it takes: unlike an answer, a release
    /// is complete with each.
    pub(super) fn release_ranges(&mut self, ranges: &[DpaRange]) -> Result<(), DeviceError> {
        let mut ranges = ranges.to_vec();
        DpaRange::coalesce(&mut ranges);
        for range in &ranges {
            self.check_release(range, &ranges)?;
        }
        // One range may span regions where they touch; the device wants each within one.
        let ranges: Vec<DpaRange> = ranges
            .iter()
            .flat_map(|range| {
                self.regions
                    .iter()
                    .filter_map(|region| region.range().intersection(range))
            })
            .collect();
        let per_command = ranges_per_command(self.mailbox.payload_len());
        for ranges in ranges.chunks(per_command) {
            match self.mailbox.execute(&Release {
                ranges,
                more: false,
            }) {
                Ok(()) => self.counters.bytes_released += self.forget(ranges),
                Err(error) => {
                    if let MailboxError::Timeout { .. } = error {
                        self.unsettled_release = ranges.to_vec();
                    }
                    if error.return_code() == Some(ReturnCode::InvalidPhysicalAddress) {
                        // The device does not think that we hold this: a record is lost.
                        self.catch_up()?;
                    }
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Refuses what the device would refuse, and what would tear a tag group apart.
    fn check_release(&self, range: &DpaRange, all: &[DpaRange]) -> Result<(), DeviceError> {
        let range = *range;
        let mut held = 0;
        for extent in &self.accepted {
            let Some(part) = extent.range.intersection(&range) else {
                continue;
            };
            held += part.len;
            if let Some(region) = self.region_of(&extent.range)
                && !part.is_aligned(region.base, region.block_size)
            {
                return Err(DeviceError::Misaligned {
                    range,
                    block_size: region.block_size,
                });
            }
            let tag = extent.tag;
            let mut group = self.accepted.iter().filter(|other| other.tag == tag);
            let covered = |extent: &Extent| all.iter().any(|range| range.contains(&extent.range));
            if !tag.is_null() && !group.all(covered) {
                return Err(DeviceError::PartOfTagGroup { range, tag });
            }
        }
        if range.is_empty() || held != range.len {
            return Err(DeviceError::NotHeld { range });
        }
        Ok(())
    }

    /// Finds out what became of a release that did not complete.
    pub(super) fn settle_release(&mut self) -> Result<(), DeviceError> {
        if self.unsettled_release.is_empty() {
            return Ok(());
        }
        let listed = self.listed()?;
        let ranges = std::mem::take(&mut self.unsettled_release);
        for range in ranges {
            if !listed.iter().any(|extent| extent.range.intersects(&range)) {
                self.counters.bytes_released += self.forget(&[range]);
            }
        }
        Ok(())
    }

    /// Takes ranges off what is held; extents that are cut leave their pieces. Returns how many
    /// bytes that were.
    fn forget(&mut self, ranges: &[DpaRange]) -> u64 {
        let held =
            |accepted: &[Extent]| accepted.iter().map(|extent| extent.range.len).sum::<u64>();
        let before = held(&self.accepted);
        for cut in ranges {
            let pieces = self.accepted.iter().flat_map(|extent| {
                let pieces = extent.range.subtract(cut).into_iter().flatten();
                pieces.map(|range| Extent { range, ..*extent })
            });
            self.accepted = pieces.collect();
        }
        before - held(&self.accepted)
    }
}
