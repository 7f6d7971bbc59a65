//! What to take of an offered group.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::address::DpaRange;
use crate::extent::{Extent, ExtentTag};
use crate::region::DcRegion;

/// Why offered capacity is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Error)]
#[non_exhaustive]
pub enum RejectReason {
    /// Start and length exceed 64 bits together.
    #[error("its end does not fit in 64 bits")]
    Wraps,
    /// It has no bytes.
    #[error("it is empty")]
    Empty,
    /// It does not lie in one DC region.
    #[error("it does not lie within one DC region")]
    OutsideRegions,
    /// It is not whole blocks.
    #[error("it is not a multiple of the {block_size:#x}-byte block")]
    Misaligned {
        /// Block size of its DC region in bytes.
        block_size: u64,
    },
    /// It overlaps capacity that is held already.
    #[error("it overlaps an extent that is held already")]
    OverlapsAccepted,
    /// It overlaps an earlier extent of its own group.
    #[error("it overlaps an earlier extent of its group")]
    OverlapsGroup,
    /// Its tag has extents already; the capacity of one tag comes in one go.
    #[error("its tag is live already")]
    TagLive,
    /// The sequence numbers of its tag are neither all 0 nor 0 to n-1.
    #[error("the sequence numbers of its tag are neither all 0 nor 0 to n-1")]
    BadSequence,
    /// Its tag has extents in more than one DC region.
    #[error("its tag spans DC regions")]
    TagSpansRegions,
    /// Another extent of its shared tag cannot be taken, and sharing is all or nothing.
    #[error("another extent of its shared tag cannot be taken")]
    SharedTagIncomplete,
    /// The host has no use for it, or could not prepare to use it.
    #[error("the host could not prepare to use it")]
    NotPrepared,
    /// The end of its group did not come in time.
    #[error("the end of its group did not come in time")]
    GroupTimedOut,
    /// Its group has more extents than may be staged.
    #[error("its group has more extents than may be staged")]
    GroupTooLarge,
    /// There was no memory to stage its group.
    #[error("there was no memory to stage its group")]
    OutOfMemory,
    /// The device can keep no more extents.
    #[error("the device can keep no more extents")]
    DeviceExhausted,
    /// The device did not take the answer that accepted it.
    #[error("the device refused the answer that accepted it with return code {code:#04x}")]
    DeviceRefused {
        /// Its return code.
        code: u16,
    },
    /// The device took the answer but does not list it.
    #[error("the device does not list it as accepted")]
    NotListed,
}

/// What the host does with one offered extent, before it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preparation {
    /// Everything is ready to use all of it.
    Whole,
    /// Ready to use this part, which must be whole blocks of an untagged extent.
    Part(DpaRange),
    /// Not ready: leave it out of the answer.
    Refused,
}

/// The host's side of an offer: prepare, then answer, then use.
///
/// Whatever can fail is done here, because nothing may fail after the device has confirmed.
pub trait Prepare: Send {
    /// Gets ready to use `offered`, which is well-formed. If its group is not accepted in the end,
    /// a [`DeviceEvent::Rejected`](crate::capacity::DeviceEvent::Rejected) names it.
    fn prepare(&mut self, offered: &Extent) -> Preparation;
}

/// Takes every well-formed extent whole.
#[derive(Clone, Copy, Debug, Default)]
pub struct TakeWhole;

impl Prepare for TakeWhole {
    fn prepare(&mut self, _offered: &Extent) -> Preparation {
        Preparation::Whole
    }
}

/// What becomes of one offered extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// This range of it is accepted.
    Accept(DpaRange),
    /// Nothing of it is.
    Reject(RejectReason),
}

/// One decision for each extent of a group, in the group's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// As long as the group.
    pub decisions: Vec<Decision>,
}

impl Verdict {
    /// Rejects all of a group of `len` extents.
    pub fn reject_all(len: usize, reason: RejectReason) -> Self {
        Self {
            decisions: vec![Decision::Reject(reason); len],
        }
    }

    /// What is accepted: one range for each accepted extent, in the order of the events, never
    /// merged, because a merged range lies in no single offered extent.
    pub fn accepted(&self) -> Vec<DpaRange> {
        let accepted = |decision: &Decision| match decision {
            Decision::Accept(range) => Some(*range),
            Decision::Reject(_) => None,
        };
        self.decisions.iter().filter_map(accepted).collect()
    }
}

/// Decides about a group: rejects what is malformed and nothing else, and has the host prepare
/// for the rest.
///
/// `held` are the accepted extents in order of DPA. Sequence numbers other than 0 say that a tag
/// is shared with other hosts, which is all or nothing.
pub fn judge(
    offered: &[Extent],
    regions: &[DcRegion],
    held: &[Extent],
    prepare: &mut dyn Prepare,
) -> Verdict {
    let mut decisions = Vec::with_capacity(offered.len());
    let mut earlier: Vec<DpaRange> = Vec::with_capacity(offered.len());
    for extent in offered {
        decisions.push(match well_formed(extent, regions, held, &mut earlier) {
            Ok(()) => Decision::Accept(extent.range),
            Err(reason) => Decision::Reject(reason),
        });
    }
    for (tag, members) in tag_groups(offered) {
        if let Err(reason) = tag_group(tag, &members, offered, regions, held) {
            for &member in &members {
                decisions[member] = Decision::Reject(reason);
            }
        }
    }
    for (extent, decision) in offered.iter().zip(&mut decisions) {
        if matches!(decision, Decision::Accept(_)) {
            *decision = prepared(extent, region_of(&extent.range, regions), prepare);
        }
    }
    for (_, members) in tag_groups(offered) {
        keep_shared_whole(&members, offered, &mut decisions);
    }
    Verdict { decisions }
}

fn region_of<'a>(range: &DpaRange, regions: &'a [DcRegion]) -> Option<&'a DcRegion> {
    regions.iter().find(|region| region.range().contains(range))
}

/// The extent by itself and against what is held or was offered before it.
fn well_formed(
    extent: &Extent,
    regions: &[DcRegion],
    held: &[Extent],
    earlier: &mut Vec<DpaRange>,
) -> Result<(), RejectReason> {
    let range = extent.range;
    if DpaRange::new(range.start, range.len).is_none() {
        return Err(RejectReason::Wraps);
    }
    if range.is_empty() {
        return Err(RejectReason::Empty);
    }
    let region = region_of(&range, regions).ok_or(RejectReason::OutsideRegions)?;
    if !range.is_aligned(region.base, region.block_size) {
        return Err(RejectReason::Misaligned {
            block_size: region.block_size,
        });
    }
    let above = held.partition_point(|extent| extent.range.end() <= range.start);
    if held
        .get(above)
        .is_some_and(|extent| extent.range.intersects(&range))
    {
        return Err(RejectReason::OverlapsAccepted);
    }
    // Disjoint and sorted, so that only the neighbours can overlap.
    let above = earlier.partition_point(|other| other.end() <= range.start);
    if earlier
        .get(above)
        .is_some_and(|other| other.intersects(&range))
    {
        return Err(RejectReason::OverlapsGroup);
    }
    earlier.insert(above, range);
    Ok(())
}

/// Indices of the offered extents of each tag, in the order of the events.
fn tag_groups(offered: &[Extent]) -> Vec<(ExtentTag, Vec<usize>)> {
    let mut members: Vec<(ExtentTag, usize)> = offered
        .iter()
        .enumerate()
        .filter(|(_, extent)| !extent.tag.is_null())
        .map(|(index, extent)| (extent.tag, index))
        .collect();
    members.sort_unstable();
    members
        .chunk_by(|one, other| one.0 == other.0)
        .map(|chunk| (chunk[0].0, chunk.iter().map(|member| member.1).collect()))
        .collect()
}

/// The extents of one tag, taken together.
fn tag_group(
    tag: ExtentTag,
    members: &[usize],
    offered: &[Extent],
    regions: &[DcRegion],
    held: &[Extent],
) -> Result<(), RejectReason> {
    if held.iter().any(|extent| extent.tag == tag) {
        return Err(RejectReason::TagLive);
    }
    let mut sequence: Vec<u16> = members
        .iter()
        .map(|&index| offered[index].shared_seq)
        .collect();
    sequence.sort_unstable();
    let unshared = sequence.iter().all(|number| *number == 0);
    let counted = sequence
        .iter()
        .enumerate()
        .all(|(place, number)| usize::from(*number) == place);
    if !unshared && !counted {
        return Err(RejectReason::BadSequence);
    }
    let mut of = members
        .iter()
        .filter_map(|&index| region_of(&offered[index].range, regions));
    let first = of.next();
    if of.any(|region| first.is_some_and(|first| first.index != region.index)) {
        return Err(RejectReason::TagSpansRegions);
    }
    Ok(())
}

fn prepared(extent: &Extent, region: Option<&DcRegion>, prepare: &mut dyn Prepare) -> Decision {
    // Tagged capacity comes and goes as it was tagged, never in parts.
    let usable = |part: &DpaRange| {
        extent.tag.is_null()
            && !part.is_empty()
            && extent.range.contains(part)
            && region.is_some_and(|region| part.is_aligned(region.base, region.block_size))
    };
    match prepare.prepare(extent) {
        Preparation::Whole => Decision::Accept(extent.range),
        Preparation::Part(part) if usable(&part) => Decision::Accept(part),
        Preparation::Part(_) | Preparation::Refused => Decision::Reject(RejectReason::NotPrepared),
    }
}

/// Sharing is all or nothing: a host after the first that takes less than the whole tag is
/// refused by the device.
fn keep_shared_whole(members: &[usize], offered: &[Extent], decisions: &mut [Decision]) {
    let shared = members.iter().any(|&index| offered[index].shared_seq != 0);
    let whole = members
        .iter()
        .all(|&index| decisions[index] == Decision::Accept(offered[index].range));
    if !shared || whole {
        return;
    }
    for &index in members {
        if matches!(decisions[index], Decision::Accept(_)) {
            decisions[index] = Decision::Reject(RejectReason::SharedTagIncomplete);
        }
    }
}
