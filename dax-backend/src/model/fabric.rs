//! The fabric manager's side of the device: FM-API 5602h, 5604h and 5605h as function calls.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::path::Path;
use std::sync::MutexGuard;
use std::time::Instant;

use thiserror::Error;
use zerocopy::FromZeros;

use super::{DYNAMIC_CAPACITY, SoftwareDevice, State};
use crate::address::{Dpa, DpaRange};
use crate::event_record::{DYNAMIC_CAPACITY_RECORD, RECORD_MORE, RawRecord};
use crate::extent::{Extent, ExtentTag};
use crate::orchestrator::{Orchestrator, OrchestratorError};
use crate::region::DcRegion;

/// How capacity for an offer is chosen (CXL r3.1 7.6.7.6.5, "Selection Policy").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddPolicy {
    /// Any free memory of the region: one extent for each length, more where it is in pieces.
    Free(Vec<u64>),
    /// One extent for each length.
    Contiguous(Vec<u64>),
    /// Exactly these ranges.
    Prescriptive(Vec<DpaRange>),
    /// What another host has under the request's tag.
    EnableSharedAccess,
}

/// An offer: everything in it is one More group.
#[derive(Clone, Debug)]
pub struct AddRequest {
    /// How it is chosen.
    pub policy: AddPolicy,
    /// Index of the DC region it comes from.
    pub region: u8,
    /// The tag its extents carry. Sharable regions need one.
    pub tag: ExtentTag,
}

/// What is taken back (CXL r3.1 7.6.7.6.6, "Removal Policy").
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReleasePolicy {
    /// Everything under a tag.
    Tag(ExtentTag),
    /// Exactly these ranges.
    Prescriptive(Vec<DpaRange>),
}

/// Why the fabric manager's request makes no sense to the device.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FabricError {
    /// There is no such region.
    #[error("there is no DC region {region}; the device has {regions}")]
    NoSuchRegion {
        /// What was asked for.
        region: u8,
        /// How many there are.
        regions: usize,
    },
    /// Nothing was asked for.
    #[error("the request names no capacity")]
    Empty,
    /// Not whole blocks of the region.
    #[error("{range} is not whole {block_size:#x}-byte blocks of DC region {region}")]
    NotInRegion {
        /// What was asked for.
        range: DpaRange,
        /// The region it should lie in.
        region: u8,
        /// Its block size in bytes.
        block_size: u64,
    },
    /// A length that is not whole blocks.
    #[error("{len:#x} bytes are not a multiple of the {block_size:#x}-byte block")]
    Misaligned {
        /// What was asked for.
        len: u64,
        /// The region's block size in bytes.
        block_size: u64,
    },
    /// Somebody has it.
    #[error("{range} is not free")]
    NotFree {
        /// What was asked for.
        range: DpaRange,
    },
    /// There is not that much, or not in one piece.
    #[error("{wanted:#x} bytes are wanted and {available:#x} are free")]
    NoCapacity {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes free; in one piece, if that was asked for.
        available: u64,
    },
    /// A sharable region's capacity is always tagged.
    #[error("DC region {region} is sharable: its capacity needs a tag")]
    TagNeeded {
        /// The region.
        region: u8,
    },
    /// Nothing of this device can be shared.
    #[error("no DC region of this device is sharable (`dcm serve --emulate` takes --sharable)")]
    NotSharable,
    /// No host has this tag.
    #[error("no capacity has tag {tag}")]
    NoSuchTag {
        /// What was asked for.
        tag: ExtentTag,
    },
    /// The host does not have it.
    #[error("{range} is not accepted by the host")]
    NotAccepted {
        /// What was asked for.
        range: DpaRange,
    },
    /// A region is changed only while nothing of it is in use.
    #[error("DC region {region} is in use")]
    RegionInUse {
        /// The region.
        region: u8,
    },
}

/// The fabric manager's side of a [`SoftwareDevice`]. Clones are the same fabric.
#[derive(Clone)]
pub struct Fabric {
    device: SoftwareDevice,
}

/// Types of dynamic capacity records, as in [`RawRecord::kind`].
const ADD: u8 = 0;
const RELEASE: u8 = 1;
const FORCED_RELEASE: u8 = 2;
const REGION_UPDATED: u8 = 3;

impl Fabric {
    pub(super) fn new(device: SoftwareDevice) -> Self {
        Self { device }
    }

    /// Offers capacity to the host as one More group, and returns what is offered.
    ///
    /// # Errors
    /// [`FabricError`]: nothing is offered.
    pub fn add(&self, request: &AddRequest) -> Result<Vec<Extent>, FabricError> {
        let mut state = self.settled();
        if request.policy == AddPolicy::EnableSharedAccess {
            let shared = state.capacity.shared_with(request.tag);
            let tag = request.tag;
            let extents = shared.ok_or(FabricError::NoSuchTag { tag })?.to_vec();
            state.offer(&extents, true);
            return Ok(extents);
        }
        let extents = state.select(request)?;
        state.offer(&extents, false);
        Ok(extents)
    }

    /// Gives capacity of a sharable region to another host, so that
    /// [`AddPolicy::EnableSharedAccess`] can offer it to this one.
    ///
    /// # Errors
    /// [`FabricError`]: nothing is given.
    pub fn add_elsewhere(&self, request: &AddRequest) -> Result<Vec<Extent>, FabricError> {
        let mut state = self.settled();
        let extents = state.select(request)?;
        state.capacity.give_elsewhere(request.tag, extents.clone());
        Ok(extents)
    }

    /// As [`add`](Self::add), but the records of the group come when the test says so.
    ///
    /// # Errors
    /// [`FabricError`]: nothing is offered.
    pub fn add_slowly(&self, request: &AddRequest) -> Result<SlowOffer, FabricError> {
        let mut state = self.settled();
        let extents = state.select(request)?;
        state.capacity.offer(extents.clone(), false);
        state.audit.groups_offered += 1;
        Ok(SlowOffer {
            device: self.device.clone(),
            records: records(ADD, &extents).collect(),
            extents,
        })
    }

    /// Offers extents as they are, well-formed or not, as a broken device might.
    pub fn add_unchecked(&self, extents: &[Extent]) {
        self.settled().offer(extents, false);
    }

    /// Writes a record into the dynamic capacity event log and does nothing else.
    pub fn push_record(&self, record: RawRecord) {
        self.settled().log(record);
    }

    /// Asks the host for capacity back; with `forced`, takes it at once.
    ///
    /// # Errors
    /// [`FabricError`]: nothing is asked.
    pub fn release(&self, policy: &ReleasePolicy, forced: bool) -> Result<(), FabricError> {
        let mut state = self.settled();
        let accepted = state.capacity.accepted();
        let wanted: Vec<Extent> = match policy {
            ReleasePolicy::Tag(tag) => {
                let tagged = accepted
                    .iter()
                    .filter(|extent| extent.tag == *tag && !tag.is_null());
                let tagged: Vec<Extent> = tagged.copied().collect();
                if tagged.is_empty() {
                    return Err(FabricError::NoSuchTag { tag: *tag });
                }
                tagged
            }
            ReleasePolicy::Prescriptive(ranges) => {
                let wanted = ranges.iter().map(|range| pieces_of(accepted, *range));
                wanted.collect::<Result<Vec<_>, _>>()?.concat()
            }
        };
        if wanted.is_empty() {
            return Err(FabricError::Empty);
        }
        let ranges: Vec<DpaRange> = wanted.iter().map(|extent| extent.range).collect();
        if forced {
            state.capacity.force(&ranges);
        }
        state.log_extents(if forced { FORCED_RELEASE } else { RELEASE }, &wanted);
        Ok(())
    }

    /// Changes a region's block size and tells the host that the region has changed.
    ///
    /// # Errors
    /// [`FabricError`]: nothing is changed.
    pub fn update_region(&self, region: u8, block_size: u64) -> Result<(), FabricError> {
        let mut state = self.settled();
        let range = state.region(region)?.range();
        if state
            .capacity
            .taken()
            .any(|extent| extent.range.intersects(&range))
        {
            return Err(FabricError::RegionInUse { region });
        }
        state.capacity.set_block_size(region.into(), block_size);
        let record = RawRecord {
            region,
            ..record(REGION_UPDATED)
        };
        state.log(record);
        Ok(())
    }

    /// Commits an HDM decoder of the device as firmware may have done before the driver came.
    pub fn commit_decoder(&self, index: usize, base: u64, size: u64, skip: u64) {
        self.settled().decoders.commit(index, base, size, skip);
    }

    /// Where a region starts; `None` if there is no such region.
    pub fn region_base(&self, region: u8) -> Option<Dpa> {
        let region = self.device.lock().region(region).ok()?;
        Some(region.base)
    }

    fn settled(&self) -> MutexGuard<'_, State> {
        let mut state = self.device.lock();
        state.settle(Instant::now());
        state
    }
}

/// A group whose records come one by one.
pub struct SlowOffer {
    device: SoftwareDevice,
    records: VecDeque<RawRecord>,
    extents: Vec<Extent>,
}

impl SlowOffer {
    /// What is offered in all.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Writes the next `count` records into the event log.
    pub fn write(&mut self, count: usize) {
        let mut state = self.device.lock();
        for record in self.records.drain(..count.min(self.records.len())) {
            state.log(record);
        }
    }
}

impl Orchestrator for Fabric {
    fn add(&mut self, sizes: &[u64], tag: ExtentTag) -> Result<Vec<Extent>, OrchestratorError> {
        let ordinary: Vec<u8> = {
            let state = self.device.lock();
            let regions = state.capacity.regions().iter();
            let mine = regions.filter(|region| !state.capacity.is_sharable(region));
            mine.map(|region| region.index).collect()
        };
        let mut refused = FabricError::Empty;
        for region in ordinary {
            let policy = AddPolicy::Free(sizes.to_vec());
            match Fabric::add(
                self,
                &AddRequest {
                    policy,
                    region,
                    tag,
                },
            ) {
                Ok(extents) => return Ok(extents),
                Err(error) => refused = error,
            }
        }
        Err(refused.into())
    }

    fn add_shared(
        &mut self,
        sizes: &[u64],
        tag: ExtentTag,
        content: Option<&Path>,
    ) -> Result<Vec<Extent>, OrchestratorError> {
        let refuse = |reason: String| OrchestratorError::Refused { reason };
        let bytes = match content {
            Some(path) => std::fs::read(path)
                .map_err(|error| refuse(format!("{}: {error}", path.display())))?,
            None => Vec::new(),
        };
        let mut state = self.settled();
        let (elsewhere, extents) = match state.capacity.shared_with(tag) {
            Some(extents) => (true, extents.to_vec()),
            None => {
                let mut regions = state.capacity.regions().iter();
                let sharable = regions.find(|region| state.capacity.is_sharable(region));
                let region = sharable.ok_or(FabricError::NotSharable)?.index;
                let policy = AddPolicy::Contiguous(sizes.to_vec());
                let request = AddRequest {
                    policy,
                    region,
                    tag,
                };
                (false, state.select(&request)?)
            }
        };
        let room: u64 = extents.iter().map(|extent| extent.range.len).sum();
        if bytes.len() as u64 > room {
            return Err(refuse(format!(
                "{} bytes of content do not fit into {room}",
                bytes.len()
            )));
        }
        let mut left = &bytes[..];
        for extent in &extents {
            let (here, rest) = left.split_at(left.len().min(extent.range.len as usize));
            let written = self.device.shared.memory.write(&extent.range, here);
            written.map_err(|error| refuse(format!("the device's memory: {error}")))?;
            left = rest;
        }
        state.offer(&extents, elsewhere);
        Ok(extents)
    }

    fn release(&mut self, ranges: &[DpaRange], forced: bool) -> Result<(), OrchestratorError> {
        let policy = ReleasePolicy::Prescriptive(ranges.to_vec());
        Ok(Fabric::release(self, &policy, forced)?)
    }
}

impl From<FabricError> for OrchestratorError {
    fn from(error: FabricError) -> Self {
        match error {
            FabricError::NoCapacity { wanted, available } => Self::NoCapacity { wanted, available },
            other => Self::Refused {
                reason: other.to_string(),
            },
        }
    }
}

impl State {
    pub(super) fn region(&self, index: u8) -> Result<DcRegion, FabricError> {
        let regions = self.capacity.regions();
        let region = regions.get(usize::from(index)).copied();
        region.ok_or(FabricError::NoSuchRegion {
            region: index,
            regions: regions.len(),
        })
    }

    /// One More group: an entry in the queue of offers, and a record for each extent.
    fn offer(&mut self, extents: &[Extent], whole: bool) {
        self.capacity.offer(extents.to_vec(), whole);
        self.audit.groups_offered += 1;
        self.log_extents(ADD, extents);
    }

    fn log_extents(&mut self, kind: u8, extents: &[Extent]) {
        for record in records(kind, extents) {
            self.log(record);
        }
    }

    fn log(&mut self, record: RawRecord) {
        let timestamp = self.timestamp();
        self.logs[DYNAMIC_CAPACITY].push(record, timestamp);
    }
}

/// A record for each extent, with More on all but the last.
fn records(kind: u8, extents: &[Extent]) -> impl Iterator<Item = RawRecord> {
    extents.iter().enumerate().map(move |(index, extent)| {
        let more = index + 1 < extents.len();
        RawRecord {
            flags: if more { RECORD_MORE } else { 0 },
            start: extent.range.start.0.into(),
            extent_len: extent.range.len.into(),
            tag: extent.tag.0,
            shared_seq: extent.shared_seq.into(),
            ..record(kind)
        }
    })
}

fn record(kind: u8) -> RawRecord {
    RawRecord {
        uuid: DYNAMIC_CAPACITY_RECORD,
        len: size_of::<RawRecord>() as u8,
        kind,
        ..RawRecord::new_zeroed()
    }
}

/// The accepted pieces that make up `range`.
fn pieces_of(accepted: &[Extent], range: DpaRange) -> Result<Vec<Extent>, FabricError> {
    let pieces = accepted.iter().filter_map(|extent| {
        let range = extent.range.intersection(&range)?;
        Some(Extent { range, ..*extent })
    });
    let pieces: Vec<Extent> = pieces.collect();
    if range.is_empty() || pieces.iter().map(|piece| piece.range.len).sum::<u64>() != range.len {
        return Err(FabricError::NotAccepted { range });
    }
    Ok(pieces)
}
