//! Devices that say what no device says; `cargo xtask fuzz` has found most of it.

use dax_backend::cmd::Command;
use dax_backend::cmd::dynamic_capacity::{ExtentListHeader, GetExtentList, ListedExtent};
use dax_backend::device::DcDevice;
use dax_backend::error::{DecoderError, DeviceError, OpenError};
use dax_backend::mmio::{Mmio, RegisterBlock};
use dax_backend::regs::mailbox::{COMMAND, CommandRegister, STATUS, Status};
use zerocopy::IntoBytes;

use crate::bench::{any_device, config, only_on_the_model};

/// A device of which one register, or the response to one command, is another.
struct Nonsense {
    real: Box<dyn Mmio>,
    /// Block, offset and value of a dword.
    register: Option<(RegisterBlock, u32, u32)>,
    /// Opcode and output of a command, whatever it asks.
    response: Option<(u16, Vec<u8>)>,
    /// Where the command register is, and what was written there last.
    command: (u32, u16),
}

impl Nonsense {
    fn of(real: Box<dyn Mmio>) -> Self {
        Self {
            real,
            register: None,
            response: None,
            command: (0, 0),
        }
    }

    /// The output that stands in for that of the last command.
    fn output(&self) -> Option<&[u8]> {
        let (opcode, output) = self.response.as_ref()?;
        (*opcode == self.command.1).then_some(output)
    }
}

impl Mmio for Nonsense {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        self.real.block_len(block)
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        assert!(offset.is_multiple_of(4), "{block:?} at {offset:#x}");
        match self.register {
            Some((there, at, value)) if (there, at) == (block, offset) => value,
            _ => self.real.read32(block, offset),
        }
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        assert!(offset.is_multiple_of(8), "{block:?} at {offset:#x}");
        let real = self.real.read64(block, offset);
        let Some(output) = self.output() else {
            return real;
        };
        let status = self.command.0 + STATUS - COMMAND;
        if offset == status {
            return Status::new().into_bits();
        }
        if offset == self.command.0 {
            let command = CommandRegister::from_bits(real);
            return command.with_payload_len(output.len() as u32).into_bits();
        }
        real
    }

    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        self.real.write32(block, offset, value);
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        self.command = (offset, value as u16);
        self.real.write64(block, offset, value);
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        self.real.read_payload(offset, payload);
        if let Some(output) = self.output() {
            payload.copy_from_slice(output);
        }
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        self.real.write_payload(offset, payload);
    }
}

/// The offset of a capability was only held against the end of its block. At an odd one registers
/// were read where no register begins: all ones, on hardware, so a doorbell that never clears.
#[test]
fn a_capability_between_two_registers_is_refused() {
    only_on_the_model!("registers in known places");
    let mut nonsense = Nonsense::of(any_device().mmio());
    // The offset of the first capability, device status.
    nonsense.register = Some((RegisterBlock::Device, 0x14, 0x27));
    let error = DcDevice::open(nonsense, config()).err().expect("refused");
    assert!(
        matches!(error, OpenError::CapabilityMisaligned { offset: 0x27, .. }),
        "{error}"
    );
}

/// The same for decoders, whose pointer has 12 bits.
#[test]
fn decoders_between_two_registers_are_none() {
    only_on_the_model!("registers in known places");
    let device = any_device();
    let block = RegisterBlock::Component;
    let mut nonsense = Nonsense::of(device.mmio());
    let header = nonsense.read32(block, 0x1010);
    // HDM decoders: bits 31:20 are where they are.
    nonsense.register = Some((block, 0x1010, header + (1 << 20)));
    let mut driver = DcDevice::open(nonsense, config()).expect("it opens");
    let decoded = driver.decoded();
    assert!(
        matches!(decoded, Err(DecoderError::NoCapability)),
        "{decoded:?}"
    );
}

/// A list of 2^32 - 1 extents was read to its end, which is not within a lifetime.
#[test]
fn a_list_of_more_extents_than_there_are_blocks_is_refused() {
    only_on_the_model!("a response made for the test");
    let mut nonsense = Nonsense::of(any_device().mmio());
    let mut list = ExtentListHeader {
        returned: 1.into(),
        total: u32::MAX.into(),
        generation: 0.into(),
        reserved: [0; 4],
    }
    .as_bytes()
    .to_vec();
    list.resize(list.len() + size_of::<ListedExtent>(), 0);
    nonsense.response = Some((GetExtentList::OPCODE, list));
    let error = DcDevice::open(nonsense, config()).err().expect("refused");
    assert!(
        matches!(
            error,
            OpenError::Device(DeviceError::ExtentListTooLong {
                total: u32::MAX,
                ..
            })
        ),
        "{error}"
    );
}
