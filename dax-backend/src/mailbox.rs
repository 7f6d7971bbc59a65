//! The primary mailbox: one command at a time, started by a doorbell (CXL r3.1 8.2.8.4).

#![forbid(unsafe_code)]

use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::cmd::{Command, MalformedResponse, ReturnCode};
use crate::mmio::{Mmio, RegisterBlock};
use crate::regs::mailbox as regs;

/// Why a command did not give an answer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MailboxError {
    /// The device said no.
    #[error("the device answers {command} with {code}, vendor code {vendor:#x}")]
    Returned {
        /// Name of the command.
        command: &'static str,
        /// What it said.
        code: ReturnCode,
        /// What it said beside, to its vendor.
        vendor: u16,
    },
    /// The doorbell did not clear. The command may still take effect.
    #[error("{command} is not done after {millis} ms; whether it took effect is not known")]
    Timeout {
        /// Name of the command.
        command: &'static str,
        /// How long was waited.
        millis: u64,
    },
    /// An earlier command still has the mailbox.
    #[error(
        "{command} was not sent: the mailbox is still busy with an earlier command after {millis} ms"
    )]
    Occupied {
        /// Name of the command.
        command: &'static str,
        /// How long was waited.
        millis: u64,
    },
    /// The registers read as all ones.
    #[error("{command} found all registers reading as ones: the device is gone")]
    DeviceGone {
        /// Name of the command.
        command: &'static str,
    },
    /// The request does not fit.
    #[error("{command} with {len} bytes does not fit the mailbox payload of {payload} bytes")]
    RequestTooLong {
        /// Name of the command.
        command: &'static str,
        /// Length of the request in bytes.
        len: usize,
        /// Length of the payload in bytes.
        payload: usize,
    },
    /// The device's answer makes no sense.
    #[error("the device answers {command} with a malformed response: {reason}")]
    Malformed {
        /// Name of the command.
        command: &'static str,
        /// What is wrong with it.
        reason: MalformedResponse,
    },
}

impl MailboxError {
    /// The device's return code, if the command got as far as that.
    pub fn return_code(&self) -> Option<ReturnCode> {
        match self {
            Self::Returned { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// How long the mailbox driver waits, and how often it tries.
#[derive(Clone, Copy, Debug)]
pub struct MailboxConfig {
    /// For the doorbell to clear. Linux waits 2 s.
    pub doorbell_timeout: Duration,
    /// For a background operation to end.
    pub background_timeout: Duration,
    /// Attempts when the device is busy or asks for a retry; at least 1.
    pub attempts: u32,
    /// Pause before the second attempt; it doubles with each one, up to 64 times.
    pub first_backoff: Duration,
}

impl Default for MailboxConfig {
    fn default() -> Self {
        Self {
            doorbell_timeout: Duration::from_secs(2),
            background_timeout: Duration::from_secs(60),
            attempts: 8,
            first_backoff: Duration::from_millis(1),
        }
    }
}

/// What the mailbox did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MailboxCounters {
    /// Doorbells rung.
    pub commands: u64,
    /// Commands that did not complete in time.
    pub timeouts: u64,
    /// Commands repeated because the device was busy.
    pub retries: u64,
}

/// The mailbox of one device, and the device's registers with it.
///
/// `&mut self` everywhere: one command is in flight at a time.
pub struct Mailbox<M> {
    mmio: M,
    /// Where the mailbox registers start in the device block.
    offset: u32,
    config: MailboxConfig,
    counters: MailboxCounters,
    payload_len: usize,
    request: Vec<u8>,
    response: Vec<u8>,
}

impl<M: Mmio> Mailbox<M> {
    /// The mailbox at `offset` in the device block, with a payload of `payload_len` bytes.
    pub fn new(mmio: M, offset: u32, payload_len: usize, config: MailboxConfig) -> Self {
        Self {
            mmio,
            offset,
            config,
            counters: MailboxCounters::default(),
            payload_len,
            request: Vec::with_capacity(payload_len),
            response: Vec::with_capacity(payload_len),
        }
    }

    /// Bytes that one request or response can have.
    pub fn payload_len(&self) -> usize {
        self.payload_len
    }

    /// What happened so far.
    pub fn counters(&self) -> MailboxCounters {
        self.counters
    }

    /// The registers, for what is not behind the mailbox.
    pub fn mmio(&mut self) -> &mut M {
        &mut self.mmio
    }

    /// Executes `command`, again if the device is busy, and decodes its response.
    ///
    /// # Errors
    /// [`MailboxError`]. After [`MailboxError::Timeout`] the command may still take effect.
    pub fn execute<C: Command>(&mut self, command: &C) -> Result<C::Response, MailboxError> {
        self.request.clear();
        command.encode(&mut self.request);
        if self.request.len() > self.payload_len {
            return Err(MailboxError::RequestTooLong {
                command: C::NAME,
                len: self.request.len(),
                payload: self.payload_len,
            });
        }
        let mut backoff = self.config.first_backoff;
        for attempt in 1.. {
            match self.ring(C::OPCODE, C::NAME) {
                Err(MailboxError::Returned { code, .. })
                    if code.is_transient() && attempt < self.config.attempts =>
                {
                    self.counters.retries += 1;
                    thread::sleep(backoff);
                    backoff = (backoff * 2).min(self.config.first_backoff * 64);
                }
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        command
            .decode(&self.response)
            .map_err(|reason| MailboxError::Malformed {
                command: C::NAME,
                reason,
            })
    }

    /// One pass through the doorbell protocol: request out, response in.
    fn ring(&mut self, opcode: u16, name: &'static str) -> Result<(), MailboxError> {
        let millis = self.config.doorbell_timeout.as_millis() as u64;
        if !self.wait_doorbell_clear() {
            return Err(MailboxError::Occupied {
                command: name,
                millis,
            });
        }
        self.counters.commands += 1;
        self.mmio
            .write_payload(self.offset + regs::PAYLOAD, &self.request);
        let command = regs::CommandRegister::new()
            .with_opcode(opcode)
            .with_payload_len(self.request.len() as u32);
        self.write64(regs::COMMAND, command.into_bits());
        self.mmio.write32(
            RegisterBlock::Device,
            self.offset + regs::CONTROL,
            regs::Control::new().with_doorbell(true).into_bits(),
        );
        if !self.wait_doorbell_clear() {
            self.counters.timeouts += 1;
            return Err(MailboxError::Timeout {
                command: name,
                millis,
            });
        }
        let raw = self.read64(regs::STATUS);
        if raw == u64::MAX {
            return Err(MailboxError::DeviceGone { command: name });
        }
        let status = regs::Status::from_bits(raw);
        let (mut code, mut vendor) = (status.return_code().into(), status.vendor_code());
        if code == ReturnCode::BackgroundStarted {
            (code, vendor) = self.wait_background(opcode, name)?;
        }
        if code != ReturnCode::Success {
            return Err(MailboxError::Returned {
                command: name,
                code,
                vendor,
            });
        }
        let command = regs::CommandRegister::from_bits(self.read64(regs::COMMAND));
        // The field has 21 bits: the device may claim more than its payload can hold.
        let len = (command.payload_len() as usize).min(self.payload_len);
        self.response.resize(len, 0);
        self.mmio
            .read_payload(self.offset + regs::PAYLOAD, &mut self.response);
        Ok(())
    }

    /// Waits for a background operation to end and returns its return and vendor code.
    fn wait_background(
        &mut self,
        opcode: u16,
        name: &'static str,
    ) -> Result<(ReturnCode, u16), MailboxError> {
        let done = wait(self.config.background_timeout, || {
            let raw = self
                .mmio
                .read64(RegisterBlock::Device, self.offset + regs::BACKGROUND_STATUS);
            let status = regs::BackgroundStatus::from_bits(raw);
            (status.opcode() == opcode && status.percent() >= 100)
                .then(|| (status.return_code().into(), status.vendor_code()))
        });
        done.ok_or_else(|| {
            self.counters.timeouts += 1;
            MailboxError::Timeout {
                command: name,
                millis: self.config.background_timeout.as_millis() as u64,
            }
        })
    }

    fn wait_doorbell_clear(&mut self) -> bool {
        wait(self.config.doorbell_timeout, || {
            let raw = self
                .mmio
                .read32(RegisterBlock::Device, self.offset + regs::CONTROL);
            (!regs::Control::from_bits(raw).doorbell()).then_some(())
        })
        .is_some()
    }

    fn read64(&mut self, register: u32) -> u64 {
        self.mmio
            .read64(RegisterBlock::Device, self.offset + register)
    }

    fn write64(&mut self, register: u32, value: u64) {
        self.mmio
            .write64(RegisterBlock::Device, self.offset + register, value);
    }
}

/// Polls until `ready` gives something or `timeout` has passed: first without a pause, because
/// most commands take microseconds, then at growing intervals of up to a millisecond.
pub(crate) fn wait<T>(timeout: Duration, mut ready: impl FnMut() -> Option<T>) -> Option<T> {
    const SPINS: u32 = 64;
    for _ in 0..SPINS {
        if let Some(found) = ready() {
            return Some(found);
        }
        std::hint::spin_loop();
    }
    let deadline = Instant::now() + timeout;
    let mut pause = Duration::from_micros(10);
    loop {
        // The clock is read before the register, so that a late wake-up still gets a last look.
        let expired = Instant::now() >= deadline;
        if let Some(found) = ready() {
            return Some(found);
        }
        if expired {
            return None;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(1));
    }
}
