//! Identify Memory Device.

#![forbid(unsafe_code)]

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Command, MalformedResponse, split};

/// Identify Memory Device, 4000h (CXL r3.1 8.2.9.9.1.1).
#[derive(Clone, Copy, Debug)]
pub struct Identify;

/// What the device says about itself. Capacities are in units of 256 MiB and cover static
/// memory only.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Identity {
    /// ASCII, padded with zeroes.
    pub firmware_revision: [u8; 16],
    /// All static memory.
    pub total_capacity: U64,
    /// Of it, always volatile.
    pub volatile_capacity: U64,
    /// Of it, always persistent.
    pub persistent_capacity: U64,
    /// Unit of what can be either.
    pub partition_alignment: U64,
    /// Records in the informational event log.
    pub informational_log_size: U16,
    /// Records in the warning event log.
    pub warning_log_size: U16,
    /// Records in the failure event log.
    pub failure_log_size: U16,
    /// Records in the fatal event log.
    pub fatal_log_size: U16,
    /// Bytes of the label storage area.
    pub lsa_size: U32,
    /// Records in the poison list.
    pub poison_list_max: [u8; 3],
    /// Poison that can be injected; 0 for no limit.
    pub poison_inject_limit: U16,
    /// Poison handling flags.
    pub poison_capabilities: u8,
    /// Quality of service telemetry flags.
    pub qos_capabilities: u8,
    /// Records in the dynamic capacity event log.
    pub dynamic_capacity_log_size: U16,
}

const _: () = assert!(size_of::<Identity>() == 69);

impl Command for Identify {
    const OPCODE: u16 = 0x4000;
    const NAME: &'static str = "Identify Memory Device";
    type Response = Identity;

    fn encode(&self, _payload: &mut Vec<u8>) {}

    fn decode(&self, payload: &[u8]) -> Result<Identity, MalformedResponse> {
        split(payload, "the identity").map(|(identity, _)| *identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let bytes: Vec<u8> = (0..69).collect();
        let identity = Identify.decode(&bytes).unwrap();
        assert_eq!(identity.total_capacity.to_bytes()[0], 16);
        assert_eq!(identity.partition_alignment.to_bytes()[0], 40);
        assert_eq!(identity.fatal_log_size.to_bytes()[0], 54);
        assert_eq!(identity.lsa_size.to_bytes()[0], 56);
        assert_eq!(identity.poison_inject_limit.to_bytes()[0], 63);
        assert_eq!(identity.dynamic_capacity_log_size.to_bytes(), [67, 68]);
    }

    #[test]
    fn a_cxl_2_identity_is_too_short() {
        assert!(Identify.decode(&[0; 67]).is_err());
    }
}
