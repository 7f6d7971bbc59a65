//! What a software device is made of.

#![forbid(unsafe_code)]

use std::time::Duration;

use crate::address::Dpa;
use crate::region::DcRegion;
use crate::regs::hdm_decoder::GRANULARITY;

/// 2 MiB: the block size of QEMU's device, and ours unless said otherwise.
pub const DEFAULT_BLOCK: u64 = 2 << 20;

/// One DC region of a [`ModelConfig`].
#[derive(Clone, Copy, Debug)]
pub struct ModelRegion {
    /// Bytes that extents can come from, a multiple of `block_size`. The region takes up the
    /// next multiple of 256 MiB of DPA space.
    pub len: u64,
    /// Bytes per block, a power of 2 from 64 up.
    pub block_size: u64,
    /// Whether its capacity can be shared between hosts; then every extent is tagged.
    pub sharable: bool,
    /// Whether released memory is zeroed before it is offered again.
    pub sanitizes: bool,
}

impl ModelRegion {
    /// `len` bytes, rounded up to whole 2 MiB blocks, for one host, not sanitized.
    pub const fn of(len: u64) -> Self {
        Self {
            len: len.next_multiple_of(DEFAULT_BLOCK),
            block_size: DEFAULT_BLOCK,
            sharable: false,
            sanitizes: false,
        }
    }
}

/// What a software device is made of. The defaults are a quick, well-behaved device.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Bytes of static memory below the DC regions, a multiple of 256 MiB. It takes up DPA space
    /// and nothing else.
    pub static_len: u64,
    /// One to eight DC regions, in the order of their DPA.
    pub dc_regions: Vec<ModelRegion>,
    /// Records that each event log holds; what comes then is lost. QEMU: 8.
    pub event_log_depth: u16,
    /// Bytes of mailbox payload, a power of 2 from 256 to 1 MiB.
    pub mailbox_payload: u32,
    /// From a doorbell being rung until the command is done.
    pub doorbell_delay: Duration,
    /// Extents that the device can keep.
    pub max_extents: u32,
    /// Whether the device does as QEMU's: the first command of an answer closes the group, an
    /// answer that is not for the oldest group is an invalid address, the generation number of
    /// the extent list stays 0, a log that is not empty always has more records, wrong handles
    /// are an invalid input, and tags are forgotten once an extent is accepted.
    pub qemu_quirks: bool,
    /// How long the device is not ready after it was made.
    pub ready_after: Duration,
    /// Commands that the device does not have.
    pub without_commands: Vec<u16>,
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            static_len: 2 * GRANULARITY,
            dc_regions: vec![ModelRegion::of(1 << 30)],
            event_log_depth: 256,
            mailbox_payload: 2048,
            doorbell_delay: Duration::ZERO,
            max_extents: 2048,
            qemu_quirks: false,
            ready_after: Duration::ZERO,
            without_commands: Vec::new(),
        }
    }
}

impl ModelConfig {
    /// One DC region of `len` bytes in 2 MiB blocks, everything else as by default.
    pub fn one_region(len: u64) -> Self {
        Self {
            dc_regions: vec![ModelRegion::of(len)],
            ..Self::default()
        }
    }

    /// The DC regions as the device reports them.
    pub(super) fn regions(&self) -> Vec<DcRegion> {
        let mut base = self.static_len;
        let regions = self.dc_regions.iter().enumerate().map(|(index, region)| {
            let decode_len = region.len.next_multiple_of(GRANULARITY);
            let start = base.next_multiple_of(region.block_size.max(GRANULARITY));
            base = start + decode_len;
            DcRegion {
                index: index as u8,
                base: Dpa(start),
                decode_len,
                len: region.len,
                block_size: region.block_size,
                sanitizes: region.sanitizes,
                dsmad_handle: index as u32 + 1,
            }
        });
        regions.collect()
    }
}
