//! Faults: what a device may do wrong, on demand.

#![forbid(unsafe_code)]

use std::time::Duration;

/// Something that goes wrong with the next command that matches, once.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The command it waits for; `None` for any.
    pub opcode: Option<u16>,
    /// How many matching commands pass before it strikes.
    pub after: u32,
    /// What goes wrong.
    pub kind: FaultKind,
}

/// What goes wrong with a command.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum FaultKind {
    /// It is not executed and gives this return code.
    ReturnCode(u16),
    /// It is executed this much later than others.
    Delay(Duration),
    /// It is not executed and the doorbell stays set until the device is reset.
    Hang,
    /// It is executed, but the doorbell stays set until the device is reset.
    HangExecuted,
    /// It is executed, and its output is said to have this many bytes.
    OutputLength(u32),
    /// It is executed, and this is its output.
    Output(Vec<u8>),
    /// It runs in the background for this long.
    Background(Duration),
    /// It is executed, and the extent list's generation number changes right after.
    GenerationChange,
}

impl Fault {
    /// Strikes the next command with this opcode.
    pub fn on(opcode: u16, kind: FaultKind) -> Self {
        Self {
            opcode: Some(opcode),
            after: 0,
            kind,
        }
    }
}

/// Takes the fault that strikes a command with this opcode, if any.
pub(super) fn strike(faults: &mut Vec<Fault>, opcode: u16) -> Option<FaultKind> {
    let matches = |fault: &Fault| fault.opcode.is_none_or(|wanted| wanted == opcode);
    let index = faults.iter().position(matches)?;
    if faults[index].after > 0 {
        faults[index].after -= 1;
        return None;
    }
    Some(faults.remove(index).kind)
}
