//! Configuration space: the DVSECs that say where a CXL device's registers are.

#![forbid(unsafe_code)]

use std::io;

use bitfield_struct::bitfield;

use crate::mmio::RegisterBlock;

/// Access to a function's 4096 bytes of configuration space, little-endian dwords.
pub trait ConfigSpace {
    /// Reads the dword at `offset`, a multiple of 4.
    ///
    /// # Errors
    /// The system's. Linux lets only root read beyond the first 64 bytes.
    fn read32(&mut self, offset: u16) -> io::Result<u32>;

    /// Writes the dword at `offset`.
    ///
    /// # Errors
    /// The system's.
    fn write32(&mut self, offset: u16, value: u32) -> io::Result<()>;
}

/// Length of configuration space, in bytes.
pub const CONFIG_LEN: u16 = 4096;
/// Offset of the command register; the status register is the upper half of its dword.
const COMMAND: u16 = 0x04;
/// Command register: the function answers at its BARs.
const MEMORY_SPACE: u32 = 1 << 1;
/// Command register: the function may start transactions.
const BUS_MASTER: u32 = 1 << 2;
/// Where the extended capabilities start (PCIe r6.0 7.6).
const EXTENDED: u16 = 0x100;
/// Extended capability id: designated vendor-specific (PCIe r6.0 7.9.6).
const DVSEC: u16 = 0x0023;
/// The CXL consortium's vendor id.
const CXL_VENDOR: u16 = 0x1e98;
/// DVSEC id: PCIe DVSEC for CXL Devices (CXL r3.1 8.1.3).
const CXL_DEVICE: u16 = 0;
/// DVSEC id: Register Locator (CXL r3.1 8.1.9).
const REGISTER_LOCATOR: u16 = 8;
/// First capability of the classic list.
const CAPABILITIES: u16 = 0x34;
/// Capability id: PCI Express.
const PCI_EXPRESS: u32 = 0x10;

/// A DVSEC of the CXL consortium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Dvsec {
    /// Where it starts.
    offset: u16,
    len: u16,
    id: u16,
}

/// Extended capability header.
#[bitfield(u32)]
struct ExtendedHeader {
    id: u16,
    #[bits(4)]
    version: u8,
    #[bits(12)]
    next: u16,
}

/// First dword after the capability header of a DVSEC.
#[bitfield(u32)]
struct DvsecHeader {
    vendor: u16,
    #[bits(4)]
    revision: u8,
    #[bits(12)]
    len: u16,
}

/// First dword of a Register Locator entry; the second one is the upper half of the offset.
#[bitfield(u32)]
struct LocatorEntry {
    #[bits(3)]
    bar: u8,
    #[bits(5)]
    _reserved: u8,
    block: u8,
    /// In 64 KiB.
    offset: u16,
}

/// Where a register block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockLocation {
    /// Which block.
    pub block: RegisterBlock,
    /// Number of the base address register, 0 to 5.
    pub bar: u8,
    /// Bytes from the BAR's start.
    pub offset: u64,
}

fn dvsecs(config: &mut impl ConfigSpace) -> io::Result<Vec<Dvsec>> {
    let mut found = Vec::new();
    let mut at = EXTENDED;
    // Each capability has at least 8 bytes: a longer chain goes round in circles.
    for _ in 0..(CONFIG_LEN - EXTENDED) / 8 {
        if !(EXTENDED..=CONFIG_LEN - 12).contains(&at) || !at.is_multiple_of(4) {
            break;
        }
        let raw = config.read32(at)?;
        if raw == 0 || raw == u32::MAX {
            break;
        }
        let header = ExtendedHeader::from_bits(raw);
        if header.id() == DVSEC {
            let dvsec = DvsecHeader::from_bits(config.read32(at + 4)?);
            if dvsec.vendor() == CXL_VENDOR {
                found.push(Dvsec {
                    offset: at,
                    len: dvsec.len().min(CONFIG_LEN - at),
                    id: config.read32(at + 8)? as u16,
                });
            }
        }
        at = header.next();
    }
    Ok(found)
}

/// Where the register blocks of a CXL device are, by its Register Locator; the first one, as in
/// Linux, if there are several. An entry that the locator's length cuts short is none.
///
/// # Errors
/// Those of `config`.
pub fn register_blocks(config: &mut impl ConfigSpace) -> io::Result<Vec<BlockLocation>> {
    const FIRST_ENTRY: u16 = 0x0c;
    const ENTRY_LEN: u16 = 8;
    let mut blocks = Vec::new();
    let mut all = dvsecs(config)?.into_iter();
    let Some(locator) = all.find(|dvsec| dvsec.id == REGISTER_LOCATOR) else {
        return Ok(blocks);
    };
    for index in 0..locator.len.saturating_sub(FIRST_ENTRY) / ENTRY_LEN {
        let at = locator.offset + FIRST_ENTRY + ENTRY_LEN * index;
        let entry = LocatorEntry::from_bits(config.read32(at)?);
        let block = match entry.block() {
            1 => RegisterBlock::Component,
            3 => RegisterBlock::Device,
            _ => continue,
        };
        let high = config.read32(at + 4)?;
        blocks.push(BlockLocation {
            block,
            bar: entry.bar(),
            offset: u64::from(high) << 32 | u64::from(entry.offset()) << 16,
        });
    }
    Ok(blocks)
}

/// Has the device answer at its BARs and decode CXL.mem: both are off after a reset.
///
/// # Errors
/// Those of `config`.
pub fn enable(config: &mut impl ConfigSpace) -> io::Result<()> {
    // The upper halves are status registers, in which zeroes change nothing.
    let command = config.read32(COMMAND)? & 0xffff;
    let wanted = command | MEMORY_SPACE | BUS_MASTER;
    if command != wanted {
        config.write32(COMMAND, wanted)?;
    }
    for dvsec in dvsecs(config)? {
        const CONTROL: u16 = 0x0c;
        const MEM_ENABLE: u32 = 1 << 2;
        if dvsec.id == CXL_DEVICE && dvsec.len > CONTROL {
            let control = config.read32(dvsec.offset + CONTROL)? & 0xffff;
            if control & MEM_ENABLE == 0 {
                config.write32(dvsec.offset + CONTROL, control | MEM_ENABLE)?;
            }
        }
    }
    Ok(())
}

/// The port number of a root or downstream port, which decoders above it name it by
/// (Link Capabilities, PCIe r6.0 7.5.3.6). `None` if it has no PCI Express capability.
///
/// # Errors
/// Those of `config`.
pub fn port_number(config: &mut impl ConfigSpace) -> io::Result<Option<u8>> {
    let mut at = (config.read32(CAPABILITIES)? & 0xfc) as u16;
    for _ in 0..48 {
        if at < 0x40 {
            break;
        }
        let header = config.read32(at)?;
        if header & 0xff == PCI_EXPRESS {
            return Ok(Some((config.read32(at + 0x0c)? >> 24) as u8));
        }
        at = (header >> 8 & 0xfc) as u16;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Memory(Vec<u8>);

    impl ConfigSpace for Memory {
        fn read32(&mut self, offset: u16) -> io::Result<u32> {
            let at = usize::from(offset);
            let bytes = self.0.get(at..at + 4).ok_or(io::ErrorKind::UnexpectedEof)?;
            Ok(u32::from_le_bytes(bytes.try_into().unwrap()))
        }

        fn write32(&mut self, offset: u16, value: u32) -> io::Result<()> {
            let at = usize::from(offset);
            self.0[at..at + 4].copy_from_slice(&value.to_le_bytes());
            Ok(())
        }
    }

    /// What QEMU's type 3 device shows: other capabilities before, between and after.
    fn device() -> Memory {
        let mut config = Memory(vec![0; CONFIG_LEN.into()]);
        for (offset, value) in [
            (0x100, 0x1101_0003),
            (0x110, 0x1501_0023),
            (0x114, 0x03c1_1e98),
            (0x118, 0x0002_0000),
            (0x150, 0x0001_0023),
            (0x154, 0x0240_1e98),
            (0x158, 0x0000_0008),
            (0x15c, 0x0000_0100),
            (0x164, 0x0002_0302),
            (0x168, 0x0000_0001),
            (0x34, 0x40),
            (0x40, 0x0000_6005),
            (0x60, 0x0002_0010),
            (0x6c, 0x0500_0000),
        ] {
            config.write32(offset, value).unwrap();
        }
        config
    }

    #[test]
    fn register_blocks_are_found_in_the_locator() {
        let blocks = register_blocks(&mut device()).unwrap();
        assert_eq!(
            blocks,
            [
                BlockLocation {
                    block: RegisterBlock::Component,
                    bar: 0,
                    offset: 0
                },
                BlockLocation {
                    block: RegisterBlock::Device,
                    bar: 2,
                    offset: 0x1_0002_0000
                },
            ]
        );
    }

    #[test]
    fn enabling_sets_memory_space_and_mem_enable_and_clears_no_status() {
        let mut config = device();
        config.write32(COMMAND, 0xffff_0400).unwrap();
        enable(&mut config).unwrap();
        assert_eq!(config.read32(COMMAND).unwrap(), 0x0000_0406);
        assert_eq!(config.read32(0x11c).unwrap(), 1 << 2);
    }

    #[test]
    fn circles_and_devices_that_are_gone_end() {
        let mut circle = device();
        circle.write32(0x150, 0x1001_0023).unwrap();
        // They were found anew in each round, hundreds of times.
        assert_eq!(register_blocks(&mut circle).unwrap().len(), 2);
        let mut gone = Memory(vec![0xff; CONFIG_LEN.into()]);
        assert_eq!(register_blocks(&mut gone).unwrap(), []);
        assert!(port_number(&mut gone).unwrap().is_none());
    }

    /// The second half of an entry was read behind configuration space, which failed the whole.
    #[test]
    fn an_entry_that_is_cut_short_is_none() {
        let mut config = device();
        // A locator with room for half an entry, at the very end.
        for (offset, value) in [
            (0x110, 0xff01_0023),
            (0xff0, 0x0001_0023),
            (0xff4, 0x0240_1e98),
            (0xff8, 0x0000_0008),
            (0xffc, 0x0000_0100),
        ] {
            config.write32(offset, value).unwrap();
        }
        assert_eq!(register_blocks(&mut config).unwrap(), []);
    }

    #[test]
    fn port_number_is_in_the_link_capabilities() {
        assert_eq!(port_number(&mut device()).unwrap(), Some(5));
    }
}
