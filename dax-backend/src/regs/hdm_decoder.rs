//! HDM decoder capability (CXL r3.1 8.2.4.20).

#![forbid(unsafe_code)]

use bitfield_struct::bitfield;

/// Offset of [`DecoderCapability`] in the capability.
pub const CAPABILITY: u32 = 0x00;
/// Offset of [`GlobalControl`] in the capability.
pub const GLOBAL_CONTROL: u32 = 0x04;
/// Offset of decoder 0 in the capability.
pub const DECODERS: u32 = 0x10;
/// Length of one decoder's registers.
pub const DECODER_LEN: u32 = 0x20;

/// In a decoder: bits 31:28 of the base HPA.
pub const BASE_LOW: u32 = 0x00;
/// In a decoder: bits 63:32 of the base HPA.
pub const BASE_HIGH: u32 = 0x04;
/// In a decoder: bits 31:28 of the length.
pub const SIZE_LOW: u32 = 0x08;
/// In a decoder: bits 63:32 of the length.
pub const SIZE_HIGH: u32 = 0x0c;
/// In a decoder: [`DecoderControl`].
pub const CONTROL: u32 = 0x10;
/// In an endpoint's decoder: bits 31:28 of the DPA skip.
pub const SKIP_LOW: u32 = 0x14;
/// In an endpoint's decoder: bits 63:32 of the DPA skip.
pub const SKIP_HIGH: u32 = 0x18;

/// Unit of base, length and skip: 256 MiB.
pub const GRANULARITY: u64 = 256 << 20;

/// HDM Decoder Capability register.
#[bitfield(u32)]
pub struct DecoderCapability {
    /// Encoded, see [`DecoderCapability::decoders`].
    #[bits(4)]
    pub count_code: u8,
    #[bits(4)]
    pub target_count: u8,
    #[bits(24)]
    _rest: u32,
}

impl DecoderCapability {
    /// Number of decoders; 0 for a code that CXL does not define.
    pub const fn decoders(&self) -> u8 {
        match self.count_code() {
            0 => 1,
            code @ 1..=8 => code * 2,
            code @ 9..=12 => 16 + (code - 8) * 4,
            _ => 0,
        }
    }
}

/// HDM Decoder Global Control register.
#[bitfield(u32)]
pub struct GlobalControl {
    pub poison_on_error: bool,
    pub enable: bool,
    #[bits(30)]
    _reserved: u32,
}

/// HDM Decoder n Control register.
#[bitfield(u32)]
pub struct DecoderControl {
    /// Interleave granularity is 256 << n bytes.
    #[bits(4)]
    pub granularity: u8,
    /// Interleave ways: 0 to 4 are 1 to 16; 8, 9, 10 are 3, 6, 12.
    #[bits(4)]
    pub ways: u8,
    pub lock_on_commit: bool,
    pub commit: bool,
    pub committed: bool,
    pub error: bool,
    /// Host-only coherent, which a type 3 device is.
    pub host_only: bool,
    #[bits(19)]
    _reserved: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_read_from_hardware_decode() {
        let control = DecoderControl::new().with_commit(true).with_host_only(true);
        assert_eq!(control.into_bits(), 0x1200);
        assert!(DecoderControl::from_bits(0x1600).committed());
    }

    #[test]
    fn decoder_counts_follow_the_table() {
        let counts: Vec<u8> = (0..=15)
            .map(|code| DecoderCapability::new().with_count_code(code).decoders())
            .collect();
        assert_eq!(
            counts,
            [1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 0, 0, 0]
        );
    }
}
