//! Device status and memory device status.

#![forbid(unsafe_code)]

use bitfield_struct::bitfield;

/// Event Status register, 8 bytes, read-only (CXL r3.1 8.2.8.3.1).
/// A bit stays set until that log is empty.
#[bitfield(u64)]
pub struct EventStatus {
    pub informational: bool,
    pub warning: bool,
    pub failure: bool,
    pub fatal: bool,
    pub dynamic_capacity: bool,
    #[bits(59)]
    _reserved: u64,
}

/// Memory Device Status register, 8 bytes, read-only (CXL r3.1 8.2.8.5.1).
#[bitfield(u64)]
pub struct MemoryDeviceStatus {
    pub fatal: bool,
    pub firmware_halt: bool,
    /// 0 not ready, 1 ready, 2 error, 3 disabled.
    #[bits(2)]
    pub media_status: u8,
    pub mailbox_ready: bool,
    #[bits(3)]
    pub reset_needed: u8,
    #[bits(56)]
    _reserved: u64,
}

impl MemoryDeviceStatus {
    /// Whether commands and memory accesses are possible.
    pub const fn is_ready(&self) -> bool {
        self.mailbox_ready() && self.media_status() == 1 && !self.fatal() && !self.firmware_halt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_from_hardware_decode() {
        assert!(MemoryDeviceStatus::from_bits(0x14).is_ready());
        assert!(!MemoryDeviceStatus::from_bits(0x15).is_ready());
        assert!(!MemoryDeviceStatus::from_bits(0x10).is_ready());
        assert!(!MemoryDeviceStatus::from_bits(u64::MAX).is_ready());
        assert!(EventStatus::from_bits(0x10).dynamic_capacity());
    }
}
