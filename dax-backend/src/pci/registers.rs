//! Register blocks mapped into this process.

use std::fs::File;
use std::io;
use std::sync::atomic::{Ordering, fence};

use memmap2::{MmapOptions, MmapRaw};

use crate::mmio::{Mmio, RegisterBlock};

/// A part of a mapped file.
#[derive(Debug)]
struct Block {
    map: MmapRaw,
    /// Where the block starts in the mapping.
    start: usize,
    len: u32,
}

/// Register blocks in files that can be mapped: `resourceN` of sysfs, `/dev/mem`.
#[derive(Debug, Default)]
pub struct MappedRegisters {
    component: Option<Block>,
    device: Option<Block>,
}

impl MappedRegisters {
    /// Maps `block` from `file`: it starts `skip` bytes into the `len` bytes at `offset`.
    ///
    /// # Errors
    /// The system's: no rights, a kernel locked down, a range that the file does not have.
    pub fn map(
        &mut self,
        block: RegisterBlock,
        file: &File,
        offset: u64,
        len: usize,
        skip: u64,
    ) -> io::Result<()> {
        let inside = usize::try_from(skip).ok().filter(|skip| *skip < len);
        let start = inside.ok_or(io::ErrorKind::InvalidData)?;
        let map = MmapOptions::new().offset(offset).len(len).map_raw(file)?;
        let mapped = Block {
            start,
            len: u32::try_from(len - start).unwrap_or(u32::MAX),
            map,
        };
        match block {
            RegisterBlock::Component => self.component = Some(mapped),
            RegisterBlock::Device => self.device = Some(mapped),
        }
        Ok(())
    }

    /// Where `width` bytes at `offset` are, if they are in the block and aligned.
    fn at(&self, block: RegisterBlock, offset: u32, width: u32) -> Option<*mut u8> {
        let mapped = match block {
            RegisterBlock::Component => self.component.as_ref(),
            RegisterBlock::Device => self.device.as_ref(),
        }?;
        let inside = offset
            .checked_add(width)
            .is_some_and(|end| end <= mapped.len);
        // SAFETY: `start + offset + width` is at most the mapping's length.
        (inside && offset.is_multiple_of(width))
            .then(|| unsafe { mapped.map.as_mut_ptr().add(mapped.start + offset as usize) })
    }
}

impl Mmio for MappedRegisters {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        let mapped = match block {
            RegisterBlock::Component => &self.component,
            RegisterBlock::Device => &self.device,
        };
        mapped.as_ref().map_or(0, |mapped| mapped.len)
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        // SAFETY: mapped, aligned, and of one width; registers are no Rust objects.
        self.at(block, offset, 4)
            .map_or(u32::MAX, |at| unsafe { at.cast::<u32>().read_volatile() })
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        // SAFETY: as in `read32`.
        self.at(block, offset, 8)
            .map_or(u64::MAX, |at| unsafe { at.cast::<u64>().read_volatile() })
    }

    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        // A doorbell must not overtake the payload before it.
        fence(Ordering::SeqCst);
        if let Some(at) = self.at(block, offset, 4) {
            // SAFETY: as in `read32`.
            unsafe { at.cast::<u32>().write_volatile(value) };
        }
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        if let Some(at) = self.at(block, offset, 8) {
            // SAFETY: as in `read32`.
            unsafe { at.cast::<u64>().write_volatile(value) };
        }
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        for (at, chunk) in (offset..).step_by(4).zip(payload.chunks_mut(4)) {
            let dword = self.read32(RegisterBlock::Device, at).to_le_bytes();
            chunk.copy_from_slice(&dword[..chunk.len()]);
        }
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        for (at, chunk) in (offset..).step_by(4).zip(payload.chunks(4)) {
            // What follows the last byte is beyond the length that the command states.
            let mut dword = [0; 4];
            dword[..chunk.len()].copy_from_slice(chunk);
            self.write32(RegisterBlock::Device, at, u32::from_le_bytes(dword));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn registers() -> (File, MappedRegisters) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x3000).unwrap();
        let mut registers = MappedRegisters::default();
        registers
            .map(RegisterBlock::Device, &file, 0x1000, 0x2000, 0x1000)
            .unwrap();
        (file, registers)
    }

    #[test]
    fn registers_are_where_the_file_has_them() {
        let (file, mut registers) = registers();
        let block = RegisterBlock::Device;
        assert_eq!(registers.block_len(block), 0x1000);
        registers.write64(block, 8, 0x1122_3344_5566_7788);
        registers.write32(block, 4, 0xaabb_ccdd);
        let mut bytes = [0; 16];
        file.read_exact_at(&mut bytes, 0x2000).unwrap();
        assert_eq!(bytes[4..8], 0xaabb_ccdd_u32.to_le_bytes());
        assert_eq!(bytes[8..], 0x1122_3344_5566_7788_u64.to_le_bytes());
        assert_eq!(registers.read32(block, 8), 0x5566_7788);
        registers.write_payload(0x20, b"payload");
        let mut payload = [0; 7];
        registers.read_payload(0x20, &mut payload);
        assert_eq!(&payload, b"payload");
    }

    #[test]
    fn outside_a_block_all_is_ones_and_nothing_is_written() {
        let (_file, mut registers) = registers();
        let block = RegisterBlock::Device;
        registers.write32(block, 0x1000, 1);
        registers.write64(block, 0xffc, 1);
        assert_eq!(registers.read32(block, 0x1000), u32::MAX);
        assert_eq!(registers.read64(block, 0xffc), u64::MAX);
        assert_eq!(registers.read64(block, u32::MAX - 7), u64::MAX);
        assert_eq!(registers.read32(RegisterBlock::Component, 0), u32::MAX);
        assert_eq!(registers.block_len(RegisterBlock::Component), 0);
    }
}
