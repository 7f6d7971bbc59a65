//! Logs of the device, of which the driver reads one: the command effects log.

#![forbid(unsafe_code)]

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Command, MalformedResponse, elements, split};

/// Identifier of the command effects log (CXL r3.1 8.2.9.5.2.1), as it goes over the wire.
pub const COMMAND_EFFECTS_LOG: [u8; 16] = [
    0x0d, 0xa9, 0xc0, 0xb5, 0xbf, 0x41, 0x4b, 0x78, 0x8f, 0x79, 0x96, 0xb1, 0x62, 0x3b, 0x3f, 0x17,
];

/// Get Supported Logs, 0400h (CXL r3.1 8.2.9.5.1).
#[derive(Clone, Copy, Debug)]
pub struct GetSupportedLogs;

/// Head of the response to [`GetSupportedLogs`].
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SupportedLogsHeader {
    /// Entries that follow.
    pub count: U16,
    /// Reserved.
    pub reserved: [u8; 6],
}

const _: () = assert!(size_of::<SupportedLogsHeader>() == 8);

/// One log that the device has.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SupportedLog {
    /// Which log.
    pub id: [u8; 16],
    /// Its length in bytes.
    pub len: U32,
}

const _: () = assert!(size_of::<SupportedLog>() == 20);

impl Command for GetSupportedLogs {
    const OPCODE: u16 = 0x0400;
    const NAME: &'static str = "Get Supported Logs";
    type Response = Vec<SupportedLog>;

    fn encode(&self, _payload: &mut Vec<u8>) {}

    fn decode(&self, payload: &[u8]) -> Result<Vec<SupportedLog>, MalformedResponse> {
        let (header, rest) = split::<SupportedLogsHeader>(payload, "the log list")?;
        let count = usize::from(header.count.get());
        let (logs, _) = elements(
            rest,
            count,
            size_of::<SupportedLogsHeader>(),
            "the log list",
        )?;
        Ok(logs.to_vec())
    }
}

/// Get Log, 0401h (CXL r3.1 8.2.9.5.2).
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct GetLog {
    /// Which log.
    pub id: [u8; 16],
    /// Where to start, in bytes.
    pub offset: U32,
    /// How much, in bytes.
    pub len: U32,
}

const _: () = assert!(size_of::<GetLog>() == 24);

impl Command for GetLog {
    const OPCODE: u16 = 0x0401;
    const NAME: &'static str = "Get Log";
    type Response = Vec<u8>;

    fn encode(&self, payload: &mut Vec<u8>) {
        payload.extend_from_slice(self.as_bytes());
    }

    fn decode(&self, payload: &[u8]) -> Result<Vec<u8>, MalformedResponse> {
        let len = self.len.get() as usize;
        payload
            .get(..len)
            .map(<[u8]>::to_vec)
            .ok_or(MalformedResponse {
                what: "the log",
                needed: len,
                len: payload.len(),
            })
    }
}

/// One entry of the command effects log.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct CommandEffect {
    /// A command that the device has.
    pub opcode: U16,
    /// What it does to the device.
    pub effect: U16,
}

const _: () = assert!(size_of::<CommandEffect>() == 4);

/// The opcodes in a command effects log; a device may pad it with zeroes.
pub fn command_effects(log: &[u8]) -> impl Iterator<Item = u16> {
    let (entries, _) =
        <[CommandEffect]>::ref_from_prefix_with_elems(log, log.len() / size_of::<CommandEffect>())
            .unwrap_or((&[], &[]));
    entries
        .iter()
        .map(|entry| entry.opcode.get())
        .take_while(|opcode| *opcode != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_padded_effects_log_ends_at_opcode_zero() {
        let log = [
            0x00, 0x48, 1, 0, 0x01, 0x48, 0, 0, 0, 0, 0, 0, 0x02, 0x48, 0, 0, 7,
        ];
        assert_eq!(command_effects(&log).collect::<Vec<_>>(), [0x4800, 0x4801]);
    }

    #[test]
    fn a_log_list_shorter_than_its_count_is_refused() {
        let payload = [2, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3];
        let error = GetSupportedLogs.decode(&payload).unwrap_err();
        assert_eq!((error.needed, error.len), (48, 11));
    }
}
