//! Configuration space: lists that go round in circles, DVSECs that lie about their length.
#![no_main]

use std::io;

use dax_backend::pci::config::{CONFIG_LEN, ConfigSpace, enable, port_number, register_blocks};
use libfuzzer_sys::fuzz_target;

/// Bytes that were never written read as zero; nothing outside may be read.
struct Space<'a> {
    bytes: &'a [u8],
    reads: u32,
}

/// Several times what there are dwords: more is a circle.
const MOST_READS: u32 = 4 * CONFIG_LEN as u32;

impl ConfigSpace for Space<'_> {
    fn read32(&mut self, offset: u16) -> io::Result<u32> {
        assert!(
            offset.is_multiple_of(4) && offset < CONFIG_LEN,
            "a read at {offset:#x}"
        );
        self.reads += 1;
        assert!(self.reads < MOST_READS, "it reads for ever");
        let at = usize::from(offset);
        let byte = |i: usize| self.bytes.get(at + i).copied().unwrap_or(0);
        Ok(u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]))
    }

    /// What is written stays unseen, as if the registers were read-only.
    fn write32(&mut self, offset: u16, value: u32) -> io::Result<()> {
        assert!(
            offset.is_multiple_of(4) && offset < CONFIG_LEN,
            "a write at {offset:#x}"
        );
        assert!(value >> 16 == 0, "{value:#x} clears status bits");
        Ok(())
    }
}

fuzz_target!(|bytes: &[u8]| {
    let space = || Space { bytes, reads: 0 };
    let blocks = register_blocks(&mut space()).unwrap();
    assert!(blocks.len() < usize::from(CONFIG_LEN));
    for block in blocks {
        assert!(block.offset.is_multiple_of(1 << 16));
    }
    enable(&mut space()).unwrap();
    port_number(&mut space()).unwrap();
});
