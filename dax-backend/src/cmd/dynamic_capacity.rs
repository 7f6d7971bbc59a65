//! Dynamic Capacity commands, 4800h to 4803h.

#![forbid(unsafe_code)]

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Command, MalformedResponse, elements, split};
use crate::address::{Dpa, DpaRange};
use crate::extent::{Extent, ExtentTag};

/// Get Dynamic Capacity Configuration, 4800h (CXL r3.1 8.2.9.9.9.1).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct GetConfiguration {
    /// How many regions to return, 1 to 8.
    pub count: u8,
    /// Index of the first one.
    pub first: u8,
}

const _: () = assert!(size_of::<GetConfiguration>() == 2);

/// Head of the response to [`GetConfiguration`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ConfigurationHeader {
    /// Regions that the device has, 1 to 8.
    pub available: u8,
    /// Regions that follow.
    pub returned: u8,
    /// Reserved.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<ConfigurationHeader>() == 8);

/// One DC region, as the device reports it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RegionConfiguration {
    /// First DPA, a multiple of 256 MiB.
    pub base: U64,
    /// DPA space reserved, in units of 256 MiB.
    pub decode_len: U64,
    /// Bytes that can be used, a multiple of the block size.
    pub len: U64,
    /// Bytes per block, a power of 2 and a multiple of 64.
    pub block_size: U64,
    /// Which DSMAS entry of the CDAT describes it.
    pub dsmad_handle: U32,
    /// Bit 0: sanitize on release.
    pub flags: u8,
    /// Reserved.
    pub reserved: [u8; 3],
}

const _: () = assert!(size_of::<RegionConfiguration>() == 40);

/// End of the response to [`GetConfiguration`], right after the last returned region.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct ConfigurationTail {
    /// Extents the device can keep.
    pub extents_supported: U32,
    /// Of them, still free.
    pub extents_available: U32,
    /// Tags the device can keep.
    pub tags_supported: U32,
    /// Of them, still free.
    pub tags_available: U32,
}

const _: () = assert!(size_of::<ConfigurationTail>() == 16);

/// The decoded response to [`GetConfiguration`].
#[derive(Clone, Debug)]
pub struct Configuration {
    /// Regions that the device has.
    pub available: u8,
    /// The ones that were asked for.
    pub regions: Vec<RegionConfiguration>,
    /// How many extents and tags the device can keep.
    pub tail: ConfigurationTail,
}

impl Command for GetConfiguration {
    const OPCODE: u16 = 0x4800;
    const NAME: &'static str = "Get Dynamic Capacity Configuration";
    type Response = Configuration;

    fn encode(&self, payload: &mut Vec<u8>) {
        payload.extend_from_slice(self.as_bytes());
    }

    fn decode(&self, payload: &[u8]) -> Result<Configuration, MalformedResponse> {
        let (header, rest) = split::<ConfigurationHeader>(payload, "the region list")?;
        let before = size_of::<ConfigurationHeader>();
        let count = usize::from(header.returned);
        let (regions, rest) =
            elements::<RegionConfiguration>(rest, count, before, "the region list")?;
        let before = before + size_of_val(regions);
        let (tail, _) = elements::<ConfigurationTail>(rest, 1, before, "the extent counts")?;
        Ok(Configuration {
            available: header.available,
            regions: regions.to_vec(),
            tail: tail[0],
        })
    }
}

/// Get Dynamic Capacity Extent List, 4801h (CXL r3.1 8.2.9.9.9.2).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct GetExtentList {
    /// How many extents to return.
    pub count: U32,
    /// Index of the first one; the total is legal and returns none.
    pub start: U32,
}

const _: () = assert!(size_of::<GetExtentList>() == 8);

/// Head of the response to [`GetExtentList`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ExtentListHeader {
    /// Extents that follow.
    pub returned: U32,
    /// Extents in the whole list.
    pub total: U32,
    /// Changes when the list does.
    pub generation: U32,
    /// Reserved.
    pub reserved: [u8; 4],
}

const _: () = assert!(size_of::<ExtentListHeader>() == 16);

/// One accepted extent, as the device lists it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ListedExtent {
    /// First DPA.
    pub start: U64,
    /// Bytes.
    pub len: U64,
    /// Tag, all zero if none.
    pub tag: [u8; 16],
    /// Place among the extents of a shared tag.
    pub shared_seq: U16,
    /// Reserved.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<ListedExtent>() == 40);

impl From<&ListedExtent> for Extent {
    fn from(listed: &ListedExtent) -> Self {
        Self {
            range: DpaRange {
                start: Dpa(listed.start.get()),
                len: listed.len.get(),
            },
            tag: ExtentTag(listed.tag),
            shared_seq: listed.shared_seq.get(),
        }
    }
}

impl From<&Extent> for ListedExtent {
    fn from(extent: &Extent) -> Self {
        Self {
            start: extent.range.start.0.into(),
            len: extent.range.len.into(),
            tag: extent.tag.0,
            shared_seq: extent.shared_seq.into(),
            reserved: [0; 6],
        }
    }
}

/// One page of the extent list.
#[derive(Clone, Debug)]
pub struct ExtentListPage {
    /// Extents in the whole list.
    pub total: u32,
    /// Changes when the list does.
    pub generation: u32,
    /// The extents of this page.
    pub extents: Vec<Extent>,
}

impl Command for GetExtentList {
    const OPCODE: u16 = 0x4801;
    const NAME: &'static str = "Get Dynamic Capacity Extent List";
    type Response = ExtentListPage;

    fn encode(&self, payload: &mut Vec<u8>) {
        payload.extend_from_slice(self.as_bytes());
    }

    /// A device may count extents as returned that it did not write (QEMU after 10.0 counts
    /// pending ones): what the payload holds and the total allows is taken, never more.
    fn decode(&self, payload: &[u8]) -> Result<ExtentListPage, MalformedResponse> {
        let (header, rest) = split::<ExtentListHeader>(payload, "the extent list")?;
        let total = header.total.get();
        let count = header
            .returned
            .get()
            .min(total.saturating_sub(self.start.get()))
            .min(self.count.get()) as usize;
        let count = count.min(rest.len() / size_of::<ListedExtent>());
        let before = size_of::<ExtentListHeader>();
        let (extents, _) = elements::<ListedExtent>(rest, count, before, "the extent list")?;
        Ok(ExtentListPage {
            total,
            generation: header.generation.get(),
            extents: extents.iter().map(Extent::from).collect(),
        })
    }
}

/// Head of both extent-list requests; the extents follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct UpdatedListHeader {
    /// Extents that follow.
    pub count: U32,
    /// Bit 0: More, the list continues in the next command. Not the More of an event record.
    pub flags: u8,
    /// Reserved.
    pub reserved: [u8; 3],
}

const _: () = assert!(size_of::<UpdatedListHeader>() == 8);

/// One range in [`AddResponse`] or [`Release`]: identity is the range, there is no tag.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct UpdatedExtent {
    /// First DPA.
    pub start: U64,
    /// Bytes.
    pub len: U64,
    /// Reserved.
    pub reserved: [u8; 8],
}

const _: () = assert!(size_of::<UpdatedExtent>() == 24);

/// How many ranges one [`AddResponse`] or [`Release`] can hold.
pub fn ranges_per_command(payload_len: usize) -> usize {
    payload_len.saturating_sub(size_of::<UpdatedListHeader>()) / size_of::<UpdatedExtent>()
}

fn encode_ranges(ranges: &[DpaRange], more: bool, payload: &mut Vec<u8>) {
    let header = UpdatedListHeader {
        count: (ranges.len() as u32).into(),
        flags: more.into(),
        reserved: [0; 3],
    };
    payload.extend_from_slice(header.as_bytes());
    for range in ranges {
        let extent = UpdatedExtent {
            start: range.start.0.into(),
            len: range.len.into(),
            reserved: [0; 8],
        };
        payload.extend_from_slice(extent.as_bytes());
    }
}

/// Add Dynamic Capacity Response, 4802h (CXL r3.1 8.2.9.9.9.3): the answer to the oldest
/// unanswered group. What was offered and is not listed is rejected; an empty list rejects all.
#[derive(Clone, Copy, Debug)]
pub struct AddResponse<'a> {
    /// What is accepted, in the order of the events.
    pub ranges: &'a [DpaRange],
    /// Whether the list continues in the next command.
    pub more: bool,
}

impl Command for AddResponse<'_> {
    const OPCODE: u16 = 0x4802;
    const NAME: &'static str = "Add Dynamic Capacity Response";
    type Response = ();

    fn encode(&self, payload: &mut Vec<u8>) {
        encode_ranges(self.ranges, self.more, payload);
    }

    fn decode(&self, _payload: &[u8]) -> Result<(), MalformedResponse> {
        Ok(())
    }
}

/// Release Dynamic Capacity, 4803h (CXL r3.1 8.2.9.9.9.4): accepted ranges given back.
#[derive(Clone, Copy, Debug)]
pub struct Release<'a> {
    /// What is given back.
    pub ranges: &'a [DpaRange],
    /// Whether the list continues in the next command.
    pub more: bool,
}

impl Command for Release<'_> {
    const OPCODE: u16 = 0x4803;
    const NAME: &'static str = "Release Dynamic Capacity";
    type Response = ();

    fn encode(&self, payload: &mut Vec<u8>) {
        encode_ranges(self.ranges, self.more, payload);
    }

    fn decode(&self, _payload: &[u8]) -> Result<(), MalformedResponse> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, len: u64) -> DpaRange {
        DpaRange::new(Dpa(start), len).unwrap()
    }

    #[test]
    fn the_extent_counts_follow_the_last_returned_region() {
        let mut payload = vec![3, 1, 0, 0, 0, 0, 0, 0];
        payload.extend((1..=5).flat_map(|field: u64| field.to_le_bytes()));
        payload.extend(
            [512u32, 500, 2, 1]
                .iter()
                .flat_map(|field| field.to_le_bytes()),
        );
        let configuration = GetConfiguration { count: 1, first: 2 }
            .decode(&payload)
            .unwrap();
        assert_eq!(configuration.available, 3);
        assert_eq!(configuration.regions.len(), 1);
        assert_eq!(configuration.regions[0].block_size.get(), 4);
        assert_eq!(configuration.tail.extents_available.get(), 500);
        payload.pop();
        let error = GetConfiguration { count: 1, first: 2 }
            .decode(&payload)
            .unwrap_err();
        assert_eq!((error.needed, error.len), (64, 63));
    }

    #[test]
    fn a_response_lists_ranges_of_24_bytes_behind_a_head_of_8() {
        let mut payload = Vec::new();
        let ranges = [range(0x2000_0000, 0x20_0000), range(0x4000_0000, 0x40_0000)];
        AddResponse {
            ranges: &ranges,
            more: true,
        }
        .encode(&mut payload);
        assert_eq!(payload.len(), 8 + 2 * 24);
        assert_eq!(payload[..8], [2, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(payload[8..16], 0x2000_0000u64.to_le_bytes());
        assert_eq!(payload[40..48], 0x40_0000u64.to_le_bytes());
        assert_eq!(ranges_per_command(2048), 85);
        assert_eq!(ranges_per_command(256), 10);
    }

    #[test]
    fn an_extent_list_is_never_longer_than_its_payload() {
        let request = GetExtentList {
            count: 50.into(),
            start: 0.into(),
        };
        let mut payload = Vec::new();
        payload.extend([7u32, 9, 3, 0].iter().flat_map(|field| field.to_le_bytes()));
        payload.extend([0u8; 2 * 40 + 39]);
        let page = request.decode(&payload).unwrap();
        assert_eq!((page.extents.len(), page.total, page.generation), (2, 9, 3));
    }
}
