//! Set Timestamp: without it, event records carry no time.

#![forbid(unsafe_code)]

use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::{Command, MalformedResponse};

/// Set Timestamp, 0301h (CXL r3.1 8.2.9.4.2).
#[derive(Clone, Copy, Debug)]
pub struct SetTimestamp {
    /// Nanoseconds since 1970-01-01.
    pub nanos: u64,
}

impl Command for SetTimestamp {
    const OPCODE: u16 = 0x0301;
    const NAME: &'static str = "Set Timestamp";
    type Response = ();

    fn encode(&self, payload: &mut Vec<u8>) {
        payload.extend_from_slice(U64::new(self.nanos).as_bytes());
    }

    fn decode(&self, _payload: &[u8]) -> Result<(), MalformedResponse> {
        Ok(())
    }
}
