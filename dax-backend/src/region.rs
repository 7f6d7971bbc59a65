//! DC regions: the parts of a device's address space that extents come from.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::address::{Dpa, DpaRange};
use crate::cmd::dynamic_capacity::RegionConfiguration;
use crate::regs::hdm_decoder::GRANULARITY;

/// A Dynamic Capacity Region, 0 to 7 of a device. Linux's newer patches say "DC partition".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DcRegion {
    /// Index on the device.
    pub index: u8,
    /// First DPA, a multiple of 256 MiB.
    pub base: Dpa,
    /// DPA space reserved, in bytes, a multiple of 256 MiB.
    pub decode_len: u64,
    /// Bytes that extents can come from; at most `decode_len`, a multiple of `block_size`.
    pub len: u64,
    /// Bytes per block, a power of 2 and a multiple of 64.
    pub block_size: u64,
    /// Whether released memory is sanitized before it is offered again.
    pub sanitizes: bool,
    /// Index of the CDAT entry that describes it.
    pub dsmad_handle: u32,
}

impl DcRegion {
    /// Where extents can lie.
    pub const fn range(&self) -> DpaRange {
        DpaRange {
            start: self.base,
            len: self.len,
        }
    }

    /// Where host addresses are decoded to.
    pub const fn decode_range(&self) -> DpaRange {
        DpaRange {
            start: self.base,
            len: self.decode_len,
        }
    }

    /// Checks what the device reports, as Linux's `cxl_dc_check` does.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(index: u8, raw: &RegionConfiguration) -> Result<Self, String> {
        let base = raw.base.get();
        let (len, block_size) = (raw.len.get(), raw.block_size.get());
        let Some(decode_len) = raw.decode_len.get().checked_mul(GRANULARITY) else {
            return Err(format!(
                "decode length {:#x} x 256 MiB wraps",
                raw.decode_len.get()
            ));
        };
        if !block_size.is_power_of_two() || !block_size.is_multiple_of(64) {
            return Err(format!(
                "block size {block_size:#x} is not a power of 2 from 64 up"
            ));
        }
        if !base.is_multiple_of(GRANULARITY) || !base.is_multiple_of(block_size) {
            return Err(format!(
                "base {base:#x} is not a multiple of 256 MiB and of the block"
            ));
        }
        if len == 0 || !len.is_multiple_of(block_size) {
            return Err(format!(
                "length {len:#x} is not a multiple of block {block_size:#x}"
            ));
        }
        if len > decode_len {
            return Err(format!(
                "length {len:#x} exceeds decode length {decode_len:#x}"
            ));
        }
        if base.checked_add(decode_len).is_none() {
            return Err(format!(
                "base {base:#x} and decode length {decode_len:#x} wrap"
            ));
        }
        if raw.dsmad_handle.get() > 0xff {
            return Err(format!(
                "DSMAD handle {:#x} exceeds 0xff",
                raw.dsmad_handle.get()
            ));
        }
        Ok(Self {
            index,
            base: Dpa(base),
            decode_len,
            len,
            block_size,
            sanitizes: raw.flags & SANITIZE_ON_RELEASE != 0,
            dsmad_handle: raw.dsmad_handle.get(),
        })
    }
}

/// Bit 0 of a region's flags in 4800h.
pub const SANITIZE_ON_RELEASE: u8 = 1 << 0;

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> RegionConfiguration {
        RegionConfiguration {
            base: (512 << 20).into(),
            decode_len: 4.into(),
            len: (1 << 30).into(),
            block_size: (2 << 20).into(),
            dsmad_handle: 1.into(),
            flags: 0,
            reserved: [0; 3],
        }
    }

    #[test]
    fn every_malformed_field_is_refused_by_name() {
        assert!(DcRegion::check(0, &raw()).is_ok());
        let refused = |change: fn(&mut RegionConfiguration), word: &str| {
            let mut region = raw();
            change(&mut region);
            let reason = DcRegion::check(0, &region).unwrap_err();
            assert!(reason.contains(word), "{reason:?} does not name {word:?}");
        };
        refused(|region| region.base = (300 << 20).into(), "base");
        refused(
            |region| region.base = (u64::MAX - (256 << 20) + 1).into(),
            "wrap",
        );
        refused(|region| region.decode_len = u64::MAX.into(), "wraps");
        refused(|region| region.len = 0.into(), "length");
        refused(|region| region.len = (3 << 20).into(), "length");
        refused(|region| region.len = (2 << 30).into(), "exceeds");
        refused(|region| region.block_size = 0.into(), "block size");
        refused(|region| region.block_size = (3 << 20).into(), "block size");
        refused(|region| region.block_size = 32.into(), "block size");
        refused(|region| region.dsmad_handle = 0x100.into(), "DSMAD");
    }
}
