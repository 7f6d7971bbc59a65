//! Event log commands, 0100h to 0103h.

#![forbid(unsafe_code)]

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Command, MalformedResponse, elements, split};
use crate::event_record::RawRecord;

/// Which event log (CXL r3.1 table 8-54).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[non_exhaustive]
pub enum EventLogKind {
    /// Informational events.
    Informational = 0,
    /// Warnings.
    Warning = 1,
    /// Failures.
    Failure = 2,
    /// Fatal events.
    Fatal = 3,
    /// Dynamic capacity events.
    DynamicCapacity = 4,
}

/// Get Event Records, 0100h (CXL r3.1 8.2.9.2.2). Reading removes nothing.
#[derive(Clone, Copy, Debug)]
pub struct GetEventRecords {
    /// Which log.
    pub log: EventLogKind,
}

/// Head of the response to [`GetEventRecords`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct EventRecordsHeader {
    /// Bit 0 overflow; bit 1 more records in the log (not the More of a record).
    pub flags: u8,
    /// Reserved.
    pub reserved: u8,
    /// Records lost to overflow.
    pub overflow_count: U16,
    /// Time of the first loss.
    pub first_overflow: U64,
    /// Time of the last loss.
    pub last_overflow: U64,
    /// Records that follow.
    pub count: U16,
    /// Reserved.
    pub reserved2: [u8; 10],
}

const _: () = assert!(size_of::<EventRecordsHeader>() == 32);

/// Flag of [`EventRecordsHeader`]: records were lost.
pub const OVERFLOW: u8 = 1 << 0;
/// Flag of [`EventRecordsHeader`]: the log has more than this.
pub const MORE_RECORDS: u8 = 1 << 1;

/// The oldest records of a log.
#[derive(Clone, Debug)]
pub struct EventRecords {
    /// Records lost since the log was last cleared, if it overflowed. A device may say 0.
    pub overflow: Option<u16>,
    /// As they came.
    pub records: Vec<RawRecord>,
}

impl Command for GetEventRecords {
    const OPCODE: u16 = 0x0100;
    const NAME: &'static str = "Get Event Records";
    type Response = EventRecords;

    fn encode(&self, payload: &mut Vec<u8>) {
        payload.push(self.log as u8);
    }

    /// The "more records" flag is not decoded: QEMU sets it whenever the log is not empty. The
    /// only sure sign of an empty log is a count of 0.
    fn decode(&self, payload: &[u8]) -> Result<EventRecords, MalformedResponse> {
        let (header, rest) = split::<EventRecordsHeader>(payload, "the event records")?;
        let before = size_of::<EventRecordsHeader>();
        let count = usize::from(header.count.get());
        let (records, _) = elements::<RawRecord>(rest, count, before, "the event records")?;
        Ok(EventRecords {
            overflow: (header.flags & OVERFLOW != 0).then_some(header.overflow_count.get()),
            records: records.to_vec(),
        })
    }
}

/// Clear Event Records, 0101h (CXL r3.1 8.2.9.2.3). The handles are the oldest ones, in order.
#[derive(Clone, Copy, Debug)]
pub struct ClearEventRecords<'a> {
    /// Which log.
    pub log: EventLogKind,
    /// At most [`MAX_CLEAR`](Self::MAX_CLEAR), and what the payload holds.
    pub handles: &'a [u16],
}

/// Head of [`ClearEventRecords`]; the handles follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct ClearEventRecordsHeader {
    /// Which log.
    pub log: u8,
    /// Bit 0: clear all. Not used: QEMU ignores it.
    pub flags: u8,
    /// Handles that follow.
    pub count: u8,
    /// Reserved.
    pub reserved: [u8; 3],
}

const _: () = assert!(size_of::<ClearEventRecordsHeader>() == 6);

impl ClearEventRecords<'_> {
    /// The count has one byte.
    pub const MAX_CLEAR: usize = u8::MAX as usize;
}

impl Command for ClearEventRecords<'_> {
    const OPCODE: u16 = 0x0101;
    const NAME: &'static str = "Clear Event Records";
    type Response = ();

    fn encode(&self, payload: &mut Vec<u8>) {
        let header = ClearEventRecordsHeader {
            log: self.log as u8,
            flags: 0,
            count: self.handles.len() as u8,
            reserved: [0; 3],
        };
        payload.extend_from_slice(header.as_bytes());
        for handle in self.handles {
            payload.extend_from_slice(&handle.to_le_bytes());
        }
    }

    fn decode(&self, _payload: &[u8]) -> Result<(), MalformedResponse> {
        Ok(())
    }
}

/// How each log interrupts: bits 1:0 mode (0 none, 1 MSI or MSI-X, 2 firmware), bits 7:4 the
/// vector, filled in by the device (CXL r3.1 8.2.9.2.4).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
)]
#[repr(C)]
pub struct EventInterruptPolicy {
    /// Informational log.
    pub informational: u8,
    /// Warning log.
    pub warning: u8,
    /// Failure log.
    pub failure: u8,
    /// Fatal log.
    pub fatal: u8,
    /// Dynamic capacity log.
    pub dynamic_capacity: u8,
}

const _: () = assert!(size_of::<EventInterruptPolicy>() == 5);

/// Get Event Interrupt Policy, 0102h (CXL r3.1 8.2.9.2.4).
#[derive(Clone, Copy, Debug)]
pub struct GetEventInterruptPolicy;

impl Command for GetEventInterruptPolicy {
    const OPCODE: u16 = 0x0102;
    const NAME: &'static str = "Get Event Interrupt Policy";
    type Response = EventInterruptPolicy;

    fn encode(&self, _payload: &mut Vec<u8>) {}

    fn decode(&self, payload: &[u8]) -> Result<EventInterruptPolicy, MalformedResponse> {
        split(payload, "the interrupt policy").map(|(policy, _)| *policy)
    }
}

/// Set Event Interrupt Policy, 0103h (CXL r3.1 8.2.9.2.5). Read first: the other logs belong
/// to somebody else.
#[derive(Clone, Copy, Debug)]
pub struct SetEventInterruptPolicy(pub EventInterruptPolicy);

impl Command for SetEventInterruptPolicy {
    const OPCODE: u16 = 0x0103;
    const NAME: &'static str = "Set Event Interrupt Policy";
    type Response = ();

    fn encode(&self, payload: &mut Vec<u8>) {
        payload.extend_from_slice(self.0.as_bytes());
    }

    fn decode(&self, _payload: &[u8]) -> Result<(), MalformedResponse> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_beyond_the_payload_is_refused() {
        let mut payload = vec![0u8; 32 + 128];
        payload[20] = 2;
        let error = GetEventRecords {
            log: EventLogKind::DynamicCapacity,
        }
        .decode(&payload)
        .unwrap_err();
        assert_eq!((error.needed, error.len), (32 + 256, 160));
    }

    #[test]
    fn overflow_without_a_count_is_still_overflow() {
        let mut payload = vec![0u8; 32];
        payload[0] = OVERFLOW | MORE_RECORDS;
        let log = GetEventRecords {
            log: EventLogKind::DynamicCapacity,
        };
        assert_eq!(log.decode(&payload).unwrap().overflow, Some(0));
        payload[0] = MORE_RECORDS;
        assert_eq!(log.decode(&payload).unwrap().overflow, None);
    }

    #[test]
    fn clearing_lists_handles_in_order() {
        let mut payload = Vec::new();
        let clear = ClearEventRecords {
            log: EventLogKind::DynamicCapacity,
            handles: &[1, 0x203],
        };
        clear.encode(&mut payload);
        assert_eq!(payload, [4, 0, 2, 0, 0, 0, 1, 0, 3, 2]);
    }
}
