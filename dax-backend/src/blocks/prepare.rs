//! What of an offer can be memory of a node, and what the kernel does to it.

#![forbid(unsafe_code)]

use crate::address::{Dpa, DpaRange};
use crate::capacity::{CapacityDevice, DeviceCounters, DeviceEvent};
use crate::error::DeviceError;
use crate::extent::Extent;
use crate::staging::{Preparation, Prepare};

/// Takes of each offered extent the memory blocks that it covers whole: nothing smaller can be put
/// online. DC regions and decoders begin at multiples of 256 MiB, so up to that size a block is one
/// in device addresses as in host addresses; of larger ones, parts may be taken that stay offline.
#[derive(Clone, Copy, Debug)]
pub struct WholeBlocks {
    /// Bytes of a memory block.
    pub size: u64,
}

impl Prepare for WholeBlocks {
    fn prepare(&mut self, offered: &Extent) -> Preparation {
        let DpaRange { start, .. } = offered.range;
        let end = offered.range.end().0 / self.size * self.size;
        let whole = start.0.checked_next_multiple_of(self.size);
        let whole = whole.filter(|start| *start < end);
        match whole.map(|start| (start, end - start)) {
            Some((_, len)) if len == offered.range.len => Preparation::Whole,
            // Capacity of one tag is taken as it is, or not at all.
            Some((start, len)) if offered.tag.is_null() => Preparation::Part(DpaRange {
                start: Dpa(start),
                len,
            }),
            _ => Preparation::Refused,
        }
    }
}

/// A device whose memory nobody needs to wipe here: the kernel clears each page before a program
/// gets it.
#[derive(Debug)]
pub struct Cleared<D>(pub D);

impl<D: CapacityDevice> CapacityDevice for Cleared<D> {
    fn poll(&mut self) -> Result<Vec<DeviceEvent>, DeviceError> {
        self.0.poll()
    }

    fn release(&mut self, ranges: &[DpaRange]) -> Result<(), DeviceError> {
        self.0.release(ranges)
    }

    fn accepted(&self) -> &[Extent] {
        self.0.accepted()
    }

    fn dc_span(&self) -> DpaRange {
        self.0.dc_span()
    }

    fn block_size(&self) -> u64 {
        self.0.block_size()
    }

    fn sanitizes(&self, _range: &DpaRange) -> bool {
        true
    }

    fn counters(&self) -> DeviceCounters {
        self.0.counters()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::ExtentTag;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, len: u64) -> DpaRange {
        DpaRange::new(Dpa(start * MIB), len * MIB).unwrap()
    }

    #[test]
    fn whole_blocks_are_taken_and_the_rest_is_left() {
        let mut blocks = WholeBlocks { size: 128 * MIB };
        let mut of = |start, len, tag| {
            blocks.prepare(&Extent {
                range: range(start, len),
                tag,
                shared_seq: 0,
            })
        };
        let none = ExtentTag::NULL;
        assert_eq!(of(256, 256, none), Preparation::Whole);
        let part = Preparation::Part(range(256, 128));
        assert_eq!(of(250, 140, none), part);
        assert_eq!(of(256, 130, none), part);
        assert_eq!(of(130, 250, none), Preparation::Refused);
        assert_eq!(of(256, 64, none), Preparation::Refused);
        let tag = ExtentTag([1; 16]);
        assert_eq!(of(256, 128, tag), Preparation::Whole);
        assert_eq!(of(256, 130, tag), Preparation::Refused);
    }
}
