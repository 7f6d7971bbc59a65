//! Opening a device: find it, learn what it has, take over from whoever drove it before.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::{DcDevice, DeviceConfig};
use crate::address::Dpa;
use crate::capacity::{DeviceCounters, DeviceEvent};
use crate::cmd::dynamic_capacity::GetConfiguration;
use crate::cmd::identify::Identify;
use crate::cmd::logs::{COMMAND_EFFECTS_LOG, GetLog, GetSupportedLogs, command_effects};
use crate::cmd::timestamp::SetTimestamp;
use crate::cmd::{Command, ReturnCode};
use crate::error::{DeviceError, OpenError};
use crate::mailbox::{Mailbox, MailboxError, wait};
use crate::mmio::{Mmio, RegisterBlock};
use crate::region::DcRegion;
use crate::regs::capability::{
    DEVICE_ARRAY, DEVICE_HEADER_LEN, DEVICE_HEADERS, DEVICE_STATUS, DeviceArray, DeviceHeader,
    MEMORY_DEVICE_STATUS, PRIMARY_MAILBOX,
};
use crate::regs::device_status::MemoryDeviceStatus;
use crate::regs::mailbox::{CAPABILITIES, Capabilities, PAYLOAD};
use crate::staging::Staging;

/// Offsets in the device block.
struct Capability {
    status: u32,
    mailbox: u32,
    memory_status: u32,
}

impl<M: Mmio> DcDevice<M> {
    /// Takes over the device behind `mmio`.
    ///
    /// Extents that the device lists as accepted are adopted; they are in
    /// [`accepted`](crate::capacity::CapacityDevice::accepted), as is what was offered meanwhile
    /// and is accepted here. The first poll reports everything else that happened.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(mut mmio: M, config: DeviceConfig) -> Result<Self, OpenError> {
        let found = find_capabilities(&mut mmio)?;
        wait_ready(&mut mmio, found.memory_status, &config)?;
        let payload = payload_len(&mut mmio, found.mailbox)?;
        let mut mailbox = Mailbox::new(mmio, found.mailbox, payload, config.mailbox);
        let identity = mailbox.execute(&Identify)?;
        check_commands(&mut mailbox)?;
        set_timestamp(&mut mailbox)?;
        let mut device = Self {
            mailbox,
            event_status: found.status,
            log_depth: identity.dynamic_capacity_log_size.get().into(),
            regions: Vec::new(),
            accepted: Vec::new(),
            staging: Staging::new(config.staging),
            config,
            last_read: Vec::new(),
            overflow_counted: 0,
            cuts: VecDeque::new(),
            work: VecDeque::new(),
            answer: None,
            unseen_groups: 0,
            after_truncated: false,
            tells_order: false,
            answer_sent: false,
            unsaved: false,
            unsettled_release: Vec::new(),
            events: Vec::new(),
            next_drain: Instant::now(),
            counters: DeviceCounters::default(),
        };
        device.read_regions()?;
        device.accepted = device.listed()?;
        device.counters.extents_adopted = device.accepted.len() as u64;
        device.resume()?;
        Ok(device)
    }

    /// Picks up where an earlier driver stopped: first what it had staged, then the log.
    fn resume(&mut self) -> Result<(), DeviceError> {
        let now = Instant::now();
        if let Some(entry) = self.config.journal.load().map_err(DeviceError::Journal)? {
            self.staging = Staging::resume(self.config.staging, entry.open, entry.discarding, now);
            self.last_read = entry.last_read;
            self.overflow_counted = entry.overflow_counted;
            self.cuts = entry.cuts;
            self.work = entry.work;
            self.answer_sent = entry.answer.is_some();
            self.answer = entry.answer;
            self.unseen_groups = entry.unseen_groups;
            self.after_truncated = entry.after_truncated;
        }
        self.work_off()?;
        self.drain(now, true)?;
        self.save()?;
        self.events
            .retain(|event| !matches!(event, DeviceEvent::Accepted { .. }));
        Ok(())
    }

    /// Reads all DC regions (4800h) and keeps them if they make sense.
    pub(super) fn read_regions(&mut self) -> Result<(), DeviceError> {
        let mut regions: Vec<DcRegion> = Vec::new();
        loop {
            let first = regions.len() as u8;
            let configuration = self
                .mailbox
                .execute(&GetConfiguration { count: 8, first })?;
            if configuration.regions.is_empty() {
                break;
            }
            for raw in &configuration.regions {
                let index = regions.len() as u8;
                let bad = |reason| DeviceError::BadRegion { index, reason };
                let region = DcRegion::check(index, raw).map_err(bad)?;
                let below = regions
                    .last()
                    .map_or(Dpa(0), |last| last.decode_range().end());
                if region.base < below {
                    return Err(bad(format!(
                        "base {:#x} lies below the end of the region before, {:#x}",
                        region.base.0, below.0
                    )));
                }
                regions.push(region);
            }
            if regions.len() >= usize::from(configuration.available.min(8)) {
                break;
            }
        }
        if regions.is_empty() {
            let reason = "the device has no DC region".to_owned();
            return Err(DeviceError::BadRegion { index: 0, reason });
        }
        self.regions = regions;
        Ok(())
    }
}

fn find_capabilities<M: Mmio>(mmio: &mut M) -> Result<Capability, OpenError> {
    Ok(Capability {
        status: find(mmio, DEVICE_STATUS, "device status", 8)?,
        mailbox: find_mailbox(mmio)?,
        memory_status: find(mmio, MEMORY_DEVICE_STATUS, "memory device status", 8)?,
    })
}

/// Where the primary mailbox is in the device block.
pub(crate) fn find_mailbox<M: Mmio>(mmio: &mut M) -> Result<u32, OpenError> {
    find(mmio, PRIMARY_MAILBOX, "primary mailbox", PAYLOAD + 256)
}

fn find<M: Mmio>(
    mmio: &mut M,
    id: u16,
    what: &'static str,
    at_least: u32,
) -> Result<u32, OpenError> {
    let block = RegisterBlock::Device;
    let block_len = mmio.block_len(block);
    let raw = mmio.read64(block, DEVICE_ARRAY);
    let array = DeviceArray::from_bits(raw);
    if raw == u64::MAX || array.id() != 0 || array.count() == 0 {
        return Err(OpenError::NoCapability {
            what: "device capability array",
        });
    }
    for index in 0..u32::from(array.count()) {
        let at = DEVICE_HEADERS + index * DEVICE_HEADER_LEN;
        if at + DEVICE_HEADER_LEN > block_len {
            break;
        }
        if DeviceHeader::from_bits(mmio.read32(block, at)).id() != id {
            continue;
        }
        let (offset, len) = (mmio.read32(block, at + 4), mmio.read32(block, at + 8));
        if !offset.is_multiple_of(size_of::<u64>() as u32) {
            return Err(OpenError::CapabilityMisaligned { what, offset });
        }
        let end = offset.checked_add(len.max(at_least));
        if len < at_least || end.is_none_or(|end| end > block_len) {
            return Err(OpenError::CapabilityOutsideBlock {
                what,
                offset,
                len,
                block_len,
            });
        }
        return Ok(offset);
    }
    Err(OpenError::NoCapability { what })
}

fn wait_ready<M: Mmio>(
    mmio: &mut M,
    register: u32,
    config: &DeviceConfig,
) -> Result<(), OpenError> {
    let mut status = 0;
    let ready = wait(config.ready_timeout, || {
        status = mmio.read64(RegisterBlock::Device, register);
        MemoryDeviceStatus::from_bits(status)
            .is_ready()
            .then_some(())
    });
    let seconds = config.ready_timeout.as_secs();
    ready.ok_or(OpenError::NotReady { seconds, status })
}

/// Bytes of payload, which must fit the block that the mailbox is in.
pub(crate) fn payload_len<M: Mmio>(mmio: &mut M, mailbox: u32) -> Result<usize, OpenError> {
    let block = RegisterBlock::Device;
    let capabilities = Capabilities::from_bits(mmio.read32(block, mailbox + CAPABILITIES));
    let log2 = capabilities.payload_size_log2();
    if !(8..=20).contains(&log2) {
        return Err(OpenError::PayloadSize { log2 });
    }
    let (len, block_len) = (1u32 << log2, mmio.block_len(block));
    if mailbox + PAYLOAD + len > block_len {
        return Err(OpenError::CapabilityOutsideBlock {
            what: "mailbox payload",
            offset: mailbox + PAYLOAD,
            len,
            block_len,
        });
    }
    Ok(len as usize)
}

/// Whether the command effects log has the four Dynamic Capacity commands.
fn check_commands<M: Mmio>(mailbox: &mut Mailbox<M>) -> Result<(), OpenError> {
    let logs = mailbox.execute(&GetSupportedLogs)?;
    let effects = logs.iter().find(|log| log.id == COMMAND_EFFECTS_LOG);
    // A log that claims more than every opcode there is would never end.
    let len = effects.map_or(0, |log| log.len.get()).min(4 << 16) as usize;
    let mut log = Vec::new();
    while log.len() < len {
        let part = (len - log.len()).min(mailbox.payload_len());
        let request = GetLog {
            id: COMMAND_EFFECTS_LOG,
            offset: (log.len() as u32).into(),
            len: (part as u32).into(),
        };
        log.extend(mailbox.execute(&request)?);
    }
    for opcode in 0x4800..=0x4803 {
        if !command_effects(&log).any(|known| known == opcode) {
            return Err(OpenError::NotDynamicCapacity { opcode });
        }
    }
    Ok(())
}

/// Event records carry the time only if the device knows it. One without a clock is fine.
fn set_timestamp<M: Mmio>(mailbox: &mut Mailbox<M>) -> Result<(), OpenError> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let nanos = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    match mailbox.execute(&SetTimestamp { nanos }) {
        Err(MailboxError::Returned {
            code: ReturnCode::Unsupported,
            ..
        }) => Ok(()),
        other => Ok(other?),
    }
}

const _: () = assert!(
    GetConfiguration::OPCODE == 0x4800,
    "first of the checked opcodes"
);
