//! The device's register blocks, as its host reads and writes them.

#![forbid(unsafe_code)]

use std::sync::MutexGuard;
use std::time::Instant;

use super::{DYNAMIC_CAPACITY, SoftwareDevice, State, decoders};
use crate::mmio::{Mmio, RegisterBlock};
use crate::regs::capability::{
    DEVICE_HEADER_LEN, DEVICE_HEADERS, DEVICE_STATUS, DeviceArray, DeviceHeader,
    MEMORY_DEVICE_STATUS, PRIMARY_MAILBOX,
};
use crate::regs::device_status::{EventStatus, MemoryDeviceStatus};
use crate::regs::mailbox::{COMMAND, CONTROL, PAYLOAD};

const DEVICE_STATUS_OFFSET: u32 = 0x80;
const MAILBOX_OFFSET: u32 = 0x88;

/// A host's view of a [`SoftwareDevice`]: its two register blocks.
pub struct ModelMmio {
    device: SoftwareDevice,
}

impl ModelMmio {
    pub(super) fn new(device: SoftwareDevice) -> Self {
        Self { device }
    }

    /// The device as it is now: commands whose time has come are done.
    fn settled(&self) -> MutexGuard<'_, State> {
        let mut state = self.device.lock();
        state.settle(Instant::now());
        state
    }
}

impl State {
    fn memory_status_offset(&self) -> u32 {
        MAILBOX_OFFSET + self.mailbox.len()
    }

    /// Id, offset and length of the three capabilities.
    fn capabilities(&self) -> [(u16, u32, u32); 3] {
        [
            (DEVICE_STATUS, DEVICE_STATUS_OFFSET, 8),
            (PRIMARY_MAILBOX, MAILBOX_OFFSET, self.mailbox.len()),
            (MEMORY_DEVICE_STATUS, self.memory_status_offset(), 8),
        ]
    }

    fn event_status(&self) -> EventStatus {
        let pending = |log: usize| !self.mute && self.logs[log].len() > 0;
        EventStatus::new()
            .with_informational(pending(0))
            .with_warning(pending(1))
            .with_failure(pending(2))
            .with_fatal(pending(3))
            .with_dynamic_capacity(pending(DYNAMIC_CAPACITY))
    }

    fn memory_device_status(&self) -> MemoryDeviceStatus {
        let ready = Instant::now() >= self.ready_at;
        MemoryDeviceStatus::new()
            .with_media_status(ready.into())
            .with_mailbox_ready(ready)
    }

    fn read_device64(&self, offset: u32) -> u64 {
        let low = u64::from(self.read_device32(offset));
        low | u64::from(self.read_device32(offset + 4)) << 32
    }

    fn read_device32(&self, offset: u32) -> u32 {
        let half = |whole: u64| (if offset & 4 == 0 { whole } else { whole >> 32 }) as u32;
        let capabilities = self.capabilities();
        if offset < DEVICE_HEADERS {
            let array = DeviceArray::new()
                .with_version(1)
                .with_count(capabilities.len() as u16);
            return if offset < 8 {
                half(array.into_bits())
            } else {
                0
            };
        }
        let header = (offset - DEVICE_HEADERS) / DEVICE_HEADER_LEN;
        if let Some((id, at, len)) = capabilities.get(header as usize) {
            return match offset % DEVICE_HEADER_LEN {
                0 => DeviceHeader::new().with_id(*id).with_version(1).into_bits(),
                4 => *at,
                8 => *len,
                _ => 0,
            };
        }
        if offset & !7 == DEVICE_STATUS_OFFSET {
            half(self.event_status().into_bits())
        } else if (MAILBOX_OFFSET..MAILBOX_OFFSET + PAYLOAD).contains(&offset) {
            self.mailbox.read32(offset - MAILBOX_OFFSET)
        } else if offset & !7 == self.memory_status_offset() {
            half(self.memory_device_status().into_bits())
        } else {
            0
        }
    }

    fn violation(&mut self, what: &str, offset: u32) {
        self.audit.violations.push(format!("{what} at {offset:#x}"));
    }
}

impl Mmio for ModelMmio {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        match block {
            RegisterBlock::Component => decoders::BLOCK_LEN,
            RegisterBlock::Device => {
                let state = self.device.lock();
                (state.memory_status_offset() + 8).next_multiple_of(0x1000)
            }
        }
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        let state = self.settled();
        match block {
            RegisterBlock::Component => state.decoders.read(offset),
            RegisterBlock::Device => state.read_device32(offset),
        }
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        let mut state = self.settled();
        match block {
            RegisterBlock::Component => {
                state.violation("8-byte read of a component register", offset);
                0
            }
            RegisterBlock::Device => state.read_device64(offset),
        }
    }

    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        let mut state = self.settled();
        match (block, offset) {
            (RegisterBlock::Component, _) => state.decoders.write(offset, value),
            (RegisterBlock::Device, _) if offset == MAILBOX_OFFSET + CONTROL => {
                if state.mailbox.is_busy() {
                    state.violation("doorbell rung while a command is running", offset);
                }
                state.write_control(value, Instant::now());
            }
            (RegisterBlock::Device, _) => {
                state.violation("4-byte write of another register", offset);
            }
        }
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        let mut state = self.settled();
        if block != RegisterBlock::Device || offset != MAILBOX_OFFSET + COMMAND {
            state.violation("8-byte write of another register", offset);
        } else if state.mailbox.is_busy() {
            state.violation("command written while another is running", offset);
        } else {
            state.mailbox.write_command(value);
        }
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        let mut state = self.settled();
        let start = offset.wrapping_sub(MAILBOX_OFFSET + PAYLOAD) as usize;
        let end = start.saturating_add(payload.len());
        match state.mailbox.payload.get(start..end) {
            Some(bytes) => payload.copy_from_slice(bytes),
            None => {
                payload.fill(0xff);
                state.violation("payload read outside the mailbox", offset);
            }
        }
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        let mut state = self.settled();
        if state.mailbox.is_busy() {
            state.violation("payload written while a command is running", offset);
            return;
        }
        let start = offset.wrapping_sub(MAILBOX_OFFSET + PAYLOAD) as usize;
        let end = start.saturating_add(payload.len());
        match state.mailbox.payload.get_mut(start..end) {
            Some(bytes) => bytes.copy_from_slice(payload),
            None => state.violation("payload written outside the mailbox", offset),
        }
    }
}
