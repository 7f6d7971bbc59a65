//! The seam between driver and device: registers, read and written at their exact width.
//!
//! Everything above is the same code for mapped BARs, for QEMU's qtest socket and for the
//! software device in [`crate::model`].

#![forbid(unsafe_code)]

/// The two register blocks a CXL memory device has (Register Locator DVSEC, CXL r3.1 8.1.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RegisterBlock {
    /// Block id 1, component registers: HDM decoders. 4-byte accesses only.
    Component,
    /// Block id 3, CXL device registers: device status, mailbox. 4- and 8-byte accesses.
    Device,
}

/// Access to a device's registers.
///
/// `offset` counts from the start of the block and is a multiple of the width. An access outside
/// the block, or to a device that is gone, reads as all ones and writes nothing, as PCI does;
/// the driver takes such values as what they are, nonsense.
pub trait Mmio: Send {
    /// Length of a block in bytes.
    fn block_len(&self, block: RegisterBlock) -> u32;

    /// One 4-byte read.
    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32;

    /// One 8-byte read.
    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64;

    /// One 4-byte write.
    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32);

    /// One 8-byte write.
    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64);

    /// Copies the mailbox payload out of the device block. Any width may be used for it.
    fn read_payload(&mut self, offset: u32, payload: &mut [u8]);

    /// Copies a mailbox payload into the device block. Any width may be used for it.
    fn write_payload(&mut self, offset: u32, payload: &[u8]);
}

impl<M: Mmio + ?Sized> Mmio for Box<M> {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        (**self).block_len(block)
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        (**self).read32(block, offset)
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        (**self).read64(block, offset)
    }

    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        (**self).write32(block, offset, value);
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        (**self).write64(block, offset, value);
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        (**self).read_payload(offset, payload);
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        (**self).write_payload(offset, payload);
    }
}
