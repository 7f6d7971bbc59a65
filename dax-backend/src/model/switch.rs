//! A switch's mailbox for fabric managers: it tunnels to the software device behind one of its
//! ports (5300h), which takes 5604h and 5605h there (CXL r3.1 7.6.7.3.1, 7.6.7.6).

#![forbid(unsafe_code)]

use super::fabric::{AddPolicy, AddRequest, Fabric, FabricError, ReleasePolicy};
use super::mailbox::MailboxRegisters;
use crate::cmd::ReturnCode;
use crate::cmd::fm_api::{ADD_PRESCRIPTIVE, Initiated, RELEASE_PRESCRIPTIVE, Tunnelling};
use crate::mmio::{Mmio, RegisterBlock};
use crate::regs::capability::{DEVICE_HEADERS, DeviceArray, DeviceHeader, PRIMARY_MAILBOX};
use crate::regs::mailbox::{COMMAND, CONTROL, Control, PAYLOAD};

/// Bytes of the mailbox's payload, as QEMU has it.
const PAYLOAD_LEN: u32 = 2048;
const MAILBOX_OFFSET: u32 = 0x88;
const BLOCK_LEN: u32 = 0x1000;

type Output = Result<Vec<u8>, ReturnCode>;

/// The device registers of the switch: a mailbox and nothing else. A command is done when its
/// doorbell has been rung.
pub struct SwitchMmio {
    mailbox: MailboxRegisters,
    /// The device behind the switch.
    fabric: Fabric,
    /// Where it is; `None`: this is the mailbox of the device itself.
    port: Option<u8>,
}

impl SwitchMmio {
    pub(super) fn new(fabric: Fabric, port: Option<u8>) -> Self {
        Self {
            mailbox: MailboxRegisters::new(PAYLOAD_LEN),
            fabric,
            port,
        }
    }

    fn execute(&self, opcode: u16, input: &[u8]) -> Output {
        let Some(port) = self.port else {
            return self.device(opcode, input);
        };
        if opcode != 0x5300 {
            return Err(ReturnCode::Unsupported);
        }
        let message = Tunnelling::read(input).map_err(|_| ReturnCode::InvalidPayloadLength)?;
        if message.port != port {
            return Err(ReturnCode::InvalidInput);
        }
        Ok(match self.device(message.opcode, message.payload) {
            Ok(output) => message.answer(ReturnCode::Success, &output),
            Err(code) => message.answer(code, &[]),
        })
    }

    /// What the device says to a message for it.
    fn device(&self, opcode: u16, input: &[u8]) -> Output {
        let add = match opcode {
            0x5604 => true,
            0x5605 => false,
            _ => return Err(ReturnCode::Unsupported),
        };
        let asked = Initiated::read(input).map_err(|_| ReturnCode::InvalidPayloadLength)?;
        let done = match (add, asked.flags & 0xf) {
            (true, policy) => self.add(policy, asked),
            (false, policy) => self.release(policy, asked),
        };
        done.map(|()| Vec::new())
    }

    fn add(&self, policy: u8, asked: Initiated) -> Result<(), ReturnCode> {
        let policy = match policy {
            0 => AddPolicy::Free(vec![asked.length]),
            1 => AddPolicy::Contiguous(vec![asked.length]),
            ADD_PRESCRIPTIVE => AddPolicy::Prescriptive(asked.ranges),
            3 => AddPolicy::EnableSharedAccess,
            _ => return Err(ReturnCode::InvalidInput),
        };
        let request = AddRequest {
            policy,
            region: asked.region,
            tag: asked.tag,
        };
        self.fabric.add(&request).map_err(code).map(drop)
    }

    fn release(&self, policy: u8, asked: Initiated) -> Result<(), ReturnCode> {
        let forced = asked.flags & 1 << 4 != 0;
        let policy = match policy {
            0 => ReleasePolicy::Tag(asked.tag),
            RELEASE_PRESCRIPTIVE => ReleasePolicy::Prescriptive(asked.ranges),
            _ => return Err(ReturnCode::InvalidInput),
        };
        self.fabric.release(&policy, forced).map_err(code)
    }
}

/// What the specification has for it (CXL r3.1 7.6.7.6.5 and 7.6.7.6.6, return codes).
fn code(error: FabricError) -> ReturnCode {
    match error {
        FabricError::NotFree { .. } | FabricError::NotAccepted { .. } => {
            ReturnCode::InvalidPhysicalAddress
        }
        FabricError::NotInRegion { .. } | FabricError::Misaligned { .. } => {
            ReturnCode::InvalidExtentList
        }
        FabricError::NoCapacity { .. } => ReturnCode::ResourcesExhausted,
        _ => ReturnCode::InvalidInput,
    }
}

impl Mmio for SwitchMmio {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        match block {
            RegisterBlock::Component => 0,
            RegisterBlock::Device => BLOCK_LEN,
        }
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        const MAILBOX_END: u32 = MAILBOX_OFFSET + PAYLOAD;
        if block == RegisterBlock::Component {
            return u32::MAX;
        }
        match offset {
            0 => DeviceArray::new().with_version(1).with_count(1).into_bits() as u32,
            4 => (DeviceArray::new().with_version(1).with_count(1).into_bits() >> 32) as u32,
            DEVICE_HEADERS => DeviceHeader::new()
                .with_id(PRIMARY_MAILBOX)
                .with_version(1)
                .into_bits(),
            _ if offset == DEVICE_HEADERS + 4 => MAILBOX_OFFSET,
            _ if offset == DEVICE_HEADERS + 8 => self.mailbox.len(),
            MAILBOX_OFFSET..MAILBOX_END => self.mailbox.read32(offset - MAILBOX_OFFSET),
            _ => 0,
        }
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        let low = u64::from(self.read32(block, offset));
        low | u64::from(self.read32(block, offset + 4)) << 32
    }

    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        let rung = Control::from_bits(value).doorbell();
        if block == RegisterBlock::Device && offset == MAILBOX_OFFSET + CONTROL && rung {
            let (opcode, input) = self.mailbox.request();
            let output = self.execute(opcode, &input);
            self.mailbox.complete(output);
        }
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        if block == RegisterBlock::Device && offset == MAILBOX_OFFSET + COMMAND {
            self.mailbox.write_command(value);
        }
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        let start = offset.wrapping_sub(MAILBOX_OFFSET + PAYLOAD) as usize;
        let end = start.saturating_add(payload.len());
        match self.mailbox.payload.get(start..end) {
            Some(bytes) => payload.copy_from_slice(bytes),
            None => payload.fill(0xff),
        }
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        let start = offset.wrapping_sub(MAILBOX_OFFSET + PAYLOAD) as usize;
        let end = start.saturating_add(payload.len());
        if let Some(bytes) = self.mailbox.payload.get_mut(start..end) {
            bytes.copy_from_slice(payload);
        }
    }
}
