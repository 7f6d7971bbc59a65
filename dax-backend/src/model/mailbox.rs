//! The device's end of the mailbox: registers, and the moment at which a command is done.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::fault::{FaultKind, strike};
use super::{State, commands};
use crate::cmd::ReturnCode;
use crate::regs::mailbox::{
    BACKGROUND_STATUS, BackgroundStatus, CAPABILITIES, COMMAND, CONTROL, Capabilities,
    CommandRegister, Control, PAYLOAD, STATUS, Status,
};

/// Mailbox registers behind an offset from the start of the mailbox.
pub(super) struct MailboxRegisters {
    capabilities: Capabilities,
    control: Control,
    command: CommandRegister,
    status: Status,
    background: BackgroundStatus,
    pub(super) payload: Vec<u8>,
    /// The command that the doorbell was rung for.
    running: Option<Running>,
    /// When the background operation ends, and what it then says.
    background_ends: Option<(Instant, u16)>,
}

struct Running {
    /// `None`: never.
    done_at: Option<Instant>,
    fault: Option<FaultKind>,
}

impl MailboxRegisters {
    pub(super) fn new(payload: u32) -> Self {
        Self {
            capabilities: Capabilities::new().with_payload_size_log2(payload.ilog2() as u8),
            control: Control::new(),
            command: CommandRegister::new(),
            status: Status::new(),
            background: BackgroundStatus::new(),
            payload: vec![0; payload as usize],
            running: None,
            background_ends: None,
        }
    }

    /// Bytes of registers and payload.
    pub(super) fn len(&self) -> u32 {
        PAYLOAD + self.payload.len() as u32
    }

    pub(super) fn is_busy(&self) -> bool {
        self.control.doorbell()
    }

    pub(super) fn is_hung(&self) -> bool {
        matches!(self.running, Some(Running { done_at: None, .. }))
    }

    pub(super) fn read32(&self, register: u32) -> u32 {
        match register {
            CAPABILITIES => self.capabilities.into_bits(),
            CONTROL => self.control.into_bits(),
            _ => {
                let whole = self.read64(register & !7);
                (if register & 4 == 0 {
                    whole
                } else {
                    whole >> 32
                }) as u32
            }
        }
    }

    pub(super) fn read64(&self, register: u32) -> u64 {
        match register {
            COMMAND => self.command.into_bits(),
            STATUS => self.status.into_bits(),
            BACKGROUND_STATUS => self.background.into_bits(),
            _ => u64::from(self.read32(register)) | u64::from(self.read32(register + 4)) << 32,
        }
    }

    pub(super) fn write_command(&mut self, value: u64) {
        self.command = CommandRegister::from_bits(value);
    }

    /// The command that waits for the doorbell, with as much input as there can be.
    pub(super) fn request(&self) -> (u16, Vec<u8>) {
        let len = (self.command.payload_len() as usize).min(self.payload.len());
        (self.command.opcode(), self.payload[..len].to_vec())
    }

    /// The command is done, without a moment passing.
    pub(super) fn complete(&mut self, result: Result<Vec<u8>, ReturnCode>) {
        let (code, output) = match result {
            Ok(output) => (ReturnCode::Success, output),
            Err(code) => (code, Vec::new()),
        };
        self.payload[..output.len()].copy_from_slice(&output);
        self.command.set_payload_len(output.len() as u32);
        self.status = Status::new().with_return_code(code.into());
        self.control.set_doorbell(false);
    }
}

impl State {
    /// The host writes the control register.
    pub(super) fn write_control(&mut self, value: u32, now: Instant) {
        let was_busy = self.mailbox.is_busy();
        self.mailbox.control = Control::from_bits(value);
        if !self.mailbox.control.doorbell() || was_busy {
            self.mailbox.control.set_doorbell(was_busy);
            return;
        }
        let opcode = self.mailbox.command.opcode();
        let fault = strike(&mut self.faults, opcode);
        let delay = match fault {
            Some(FaultKind::Delay(delay)) => Some(self.config.doorbell_delay + delay),
            Some(FaultKind::Hang) => None,
            _ => Some(self.config.doorbell_delay),
        };
        self.mailbox.running = Some(Running {
            done_at: delay.map(|delay| now + delay),
            fault,
        });
        self.settle(now);
    }

    /// Does what the device has done by itself until `now`: called before everything else.
    pub(super) fn settle(&mut self, now: Instant) {
        if let Some((end, code)) = self.mailbox.background_ends
            && end <= now
        {
            self.mailbox.background_ends = None;
            self.mailbox.background.set_percent(100);
            self.mailbox.background.set_return_code(code);
        }
        let due = |running: &mut Running| running.done_at.is_some_and(|done_at| done_at <= now);
        if let Some(running) = self.mailbox.running.take_if(due) {
            self.execute(running.fault, now);
        }
    }

    fn execute(&mut self, fault: Option<FaultKind>, now: Instant) {
        let command = self.mailbox.command;
        let (opcode, len) = (command.opcode(), command.payload_len() as usize);
        self.audit.opcodes.push(opcode);
        let payload = self.mailbox.payload.len();
        let result = match fault {
            Some(FaultKind::ReturnCode(code)) => Err(ReturnCode::from(code)),
            _ if len > payload => Err(ReturnCode::InvalidPayloadLength),
            _ => {
                let input = self.mailbox.payload[..len].to_vec();
                commands::execute(self, opcode, &input)
            }
        };
        let (mut code, mut output) = match result {
            Ok(output) => (ReturnCode::Success, output),
            Err(code) => (code, Vec::new()),
        };
        let mut claimed = output.len() as u32;
        match fault {
            Some(FaultKind::HangExecuted) => {
                self.mailbox.running = Some(Running {
                    done_at: None,
                    fault: None,
                });
                return;
            }
            Some(FaultKind::OutputLength(len)) => claimed = len,
            Some(FaultKind::Output(bytes)) => {
                claimed = bytes.len() as u32;
                output = bytes;
            }
            Some(FaultKind::Background(time)) => {
                self.start_background(opcode, code, now, time);
                code = ReturnCode::BackgroundStarted;
            }
            Some(FaultKind::GenerationChange) => self.capacity.change_generation(),
            _ => {}
        }
        self.mailbox.payload[..output.len()].copy_from_slice(&output);
        self.mailbox.command.set_payload_len(claimed);
        self.mailbox.status = Status::new()
            .with_return_code(code.into())
            .with_background_operation(code == ReturnCode::BackgroundStarted);
        self.mailbox.control.set_doorbell(false);
    }

    fn start_background(&mut self, opcode: u16, code: ReturnCode, now: Instant, time: Duration) {
        self.mailbox.background = BackgroundStatus::new().with_opcode(opcode).with_percent(1);
        self.mailbox.background_ends = Some((now + time, code.into()));
    }
}
