//! How registers are found: the capability arrays of both blocks.

#![forbid(unsafe_code)]

use bitfield_struct::bitfield;

/// Offset of the array header in the device block (CXL r3.1 8.2.8.1).
pub const DEVICE_ARRAY: u32 = 0;
/// Offset of the first capability header in the device block.
pub const DEVICE_HEADERS: u32 = 0x10;
/// Length of one capability header in the device block.
pub const DEVICE_HEADER_LEN: u32 = 0x10;

/// Capability id: device status.
pub const DEVICE_STATUS: u16 = 0x0001;
/// Capability id: primary mailbox.
pub const PRIMARY_MAILBOX: u16 = 0x0002;
/// Capability id: memory device status.
pub const MEMORY_DEVICE_STATUS: u16 = 0x4000;

/// CXL Device Capabilities Array register, 8 bytes (CXL r3.1 8.2.8.1).
#[bitfield(u64)]
pub struct DeviceArray {
    /// 0 for this array.
    pub id: u16,
    /// 1 in CXL 2.0 and later.
    pub version: u8,
    #[bits(8)]
    _reserved: u8,
    /// Number of headers that follow.
    pub count: u16,
    #[bits(16)]
    _reserved: u16,
}

/// First 4 bytes of a device capability header (CXL r3.1 8.2.8.2); +4 is the offset, +8 the length.
#[bitfield(u32)]
pub struct DeviceHeader {
    /// Which capability.
    pub id: u16,
    /// Its version.
    pub version: u8,
    #[bits(8)]
    _reserved: u8,
}

/// Offset of the CXL.cache and CXL.mem registers in the component block (CXL r3.1 8.2.3).
pub const COMPONENT_CACHE_MEM: u32 = 0x1000;
/// Capability id in the component block: HDM decoders.
pub const HDM_DECODER: u16 = 5;

/// CXL Capability header, the first dword of the CXL.cache/mem registers (CXL r3.1 8.2.4.1).
#[bitfield(u32)]
pub struct ComponentArray {
    /// 1.
    pub id: u16,
    #[bits(4)]
    pub version: u8,
    #[bits(4)]
    pub cache_mem_version: u8,
    /// Number of headers that follow, one dword each.
    pub count: u8,
}

/// A component capability header (CXL r3.1 8.2.4.2).
#[bitfield(u32)]
pub struct ComponentHeader {
    /// Which capability; 0 is a null entry to skip.
    pub id: u16,
    #[bits(4)]
    pub version: u8,
    /// Offset from the start of the CXL.cache/mem registers.
    #[bits(12)]
    pub pointer: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_from_hardware_decode() {
        // QEMU's type 3 device: HDM decoder capability, version 3, at 0x128.
        let header = ComponentHeader::from_bits(0x1283_0005);
        assert_eq!(
            (header.id(), header.version(), header.pointer()),
            (5, 3, 0x128)
        );
        let array = DeviceArray::from_bits(0x0000_0003_0001_0000);
        assert_eq!((array.id(), array.version(), array.count()), (0, 1, 3));
    }
}
