//! Event records as the device writes them, and what they mean.

#![forbid(unsafe_code)]

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::address::{Dpa, DpaRange};
use crate::extent::{Extent, ExtentTag};

/// UUID of dynamic capacity event records (CXL r3.1 8.2.9.2.1.6), as it goes over the wire.
pub const DYNAMIC_CAPACITY_RECORD: [u8; 16] = [
    0xca, 0x95, 0xaf, 0xa7, 0xf1, 0x83, 0x40, 0x18, 0x8c, 0x2f, 0x95, 0x26, 0x8e, 0x10, 0x1a, 0x2a,
];

/// Bit 0 of [`RawRecord::flags`]: the next Add record belongs to the same group.
pub const RECORD_MORE: u8 = 1 << 0;

/// A dynamic capacity event record, 128 bytes: the common header (CXL r3.1 8.2.9.2.1) and the
/// dynamic capacity part (8.2.9.2.1.6). Records of other kinds share only the header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawRecord {
    /// Kind of record.
    pub uuid: [u8; 16],
    /// Bytes: 128.
    pub len: u8,
    /// Severity and state flags.
    pub header_flags: [u8; 3],
    /// Names the record in its log; never 0.
    pub handle: U16,
    /// A record this one belongs to.
    pub related_handle: U16,
    /// Nanoseconds since 1970, or 0 if the device was never told the time.
    pub timestamp: U64,
    /// Maintenance, LD and head ids; reserved bytes.
    pub header_rest: [u8; 16],
    /// What happened, see [`RecordKind`].
    pub kind: u8,
    /// Which of the optional fields are valid.
    pub validity: u8,
    /// The host it is for.
    pub host_id: U16,
    /// Which region has changed.
    pub region: u8,
    /// Bit 0: [`RECORD_MORE`].
    pub flags: u8,
    /// Reserved.
    pub reserved: [u8; 2],
    /// First DPA of the extent.
    pub start: U64,
    /// Bytes of the extent.
    pub extent_len: U64,
    /// Tag, all zero if none.
    pub tag: [u8; 16],
    /// Place among the extents of a shared tag.
    pub shared_seq: U16,
    /// Reserved.
    pub reserved2: [u8; 30],
    /// Extents the device can still keep.
    pub available_extents: U32,
    /// Tags the device can still keep.
    pub available_tags: U32,
}

const _: () = assert!(size_of::<RawRecord>() == 128);

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordKind {
    /// Type 0, Add Capacity: an extent is offered.
    Add {
        /// As the device wrote it: its range may wrap, be empty, misaligned or anywhere.
        extent: Extent,
        /// Whether the group goes on.
        more: bool,
    },
    /// Type 1, Release Capacity: an extent is wanted back.
    Release {
        /// What is wanted back.
        extent: Extent,
    },
    /// Type 2, Forced Capacity Release: an extent is gone.
    ForcedRelease {
        /// What is gone.
        extent: Extent,
    },
    /// Type 3, Region Configuration Updated.
    RegionUpdated {
        /// Index of the region.
        region: u8,
    },
    /// Another kind of record, or a type that a host does not get.
    Unknown {
        /// The type byte, if it is a dynamic capacity record.
        kind: Option<u8>,
    },
}

impl RawRecord {
    /// What the record says; any 128 bytes say something.
    pub fn decode(&self) -> RecordKind {
        if self.uuid != DYNAMIC_CAPACITY_RECORD {
            return RecordKind::Unknown { kind: None };
        }
        let extent = Extent {
            range: DpaRange {
                start: Dpa(self.start.get()),
                len: self.extent_len.get(),
            },
            tag: ExtentTag(self.tag),
            shared_seq: self.shared_seq.get(),
        };
        match self.kind {
            0 => RecordKind::Add {
                extent,
                more: self.flags & RECORD_MORE != 0,
            },
            1 => RecordKind::Release { extent },
            2 => RecordKind::ForcedRelease { extent },
            3 => RecordKind::RegionUpdated {
                region: self.region,
            },
            kind => RecordKind::Unknown { kind: Some(kind) },
        }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let mut bytes = [0u8; 128];
        bytes[..16].copy_from_slice(&DYNAMIC_CAPACITY_RECORD);
        bytes[20] = 0x34;
        bytes[0x35] = 1;
        bytes[0x38..0x40].copy_from_slice(&0x2000_0000u64.to_le_bytes());
        bytes[0x40..0x48].copy_from_slice(&0x20_0000u64.to_le_bytes());
        bytes[0x48] = 9;
        bytes[0x58] = 7;
        bytes[0x78] = 5;
        let record = RawRecord::read_from_bytes(&bytes).unwrap();
        assert_eq!(record.handle.get(), 0x34);
        assert_eq!(record.available_extents.get(), 5);
        let RecordKind::Add { extent, more } = record.decode() else {
            panic!("not an Add record");
        };
        assert!(more);
        assert_eq!(
            extent.range,
            DpaRange {
                start: Dpa(0x2000_0000),
                len: 0x20_0000
            }
        );
        assert_eq!((extent.tag.0[0], extent.shared_seq), (9, 7));
    }

    #[test]
    fn foreign_records_and_unknown_types_are_told_apart() {
        let mut record = RawRecord::new_zeroed();
        assert_eq!(record.decode(), RecordKind::Unknown { kind: None });
        record.uuid = DYNAMIC_CAPACITY_RECORD;
        record.kind = 9;
        assert_eq!(record.decode(), RecordKind::Unknown { kind: Some(9) });
    }
}
