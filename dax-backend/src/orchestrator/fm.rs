//! A fabric manager's mailbox: FM-API Initiate Dynamic Capacity Add and Release, 5604h and 5605h
//! (CXL r3.1 7.6.7.6.5 and 7.6.7.6.6), to a device itself, or through the mailbox of the switch
//! that it is behind (5300h, 7.6.7.3.1).
//!
//! Devices know the policy "prescriptive" at least, so that the ranges are chosen here. Return code
//! and all come before the host has answered: what became of an offer shows in the device's events
//! alone. QEMU 10.0 has the tunnel and not the commands; newer versions have both.

#![forbid(unsafe_code)]

use std::io;

use super::choice::Choice;
use super::{Orchestrator, OrchestratorError};
use crate::address::DpaRange;
use crate::cmd::fm_api::{InitiateAdd, InitiateRelease, Selection, Tunnel, Tunnelled};
use crate::cmd::{Command, ReturnCode};
use crate::device::open::{find_mailbox, payload_len};
use crate::error::OpenError;
use crate::extent::{Extent, ExtentTag};
use crate::mailbox::{Mailbox, MailboxConfig, MailboxError};
use crate::mmio::Mmio;
use crate::region::DcRegion;

/// Offers that are tried after one that is said to be somebody's already.
const ATTEMPTS: usize = 16;
/// The host, on a device that has one.
const HOST: u16 = 0;

/// Asks for capacity through a mailbox that takes the FM-API.
pub struct FmOrchestrator<M> {
    mailbox: Mailbox<M>,
    /// The device's port behind a switch.
    port: Option<u8>,
    choice: Choice,
    /// Of the last message through the tunnel.
    tag: u8,
}

/// Why a command was not carried out.
enum Refusal {
    /// The device said so.
    Returned(ReturnCode),
    /// It did not get as far as that.
    Failed(OrchestratorError),
}

impl<M: Mmio> FmOrchestrator<M> {
    /// The mailbox in the device registers of `mmio`: of the switch that has the device behind its
    /// downstream port `port`, or of the device itself. The device has `regions`.
    ///
    /// # Errors
    /// [`OpenError`]: no mailbox there.
    pub fn open(mut mmio: M, port: Option<u8>, regions: &[DcRegion]) -> Result<Self, OpenError> {
        let offset = find_mailbox(&mut mmio)?;
        let payload = payload_len(&mut mmio, offset)?;
        Ok(Self {
            mailbox: Mailbox::new(mmio, offset, payload, MailboxConfig::default()),
            port,
            choice: Choice::new(regions),
            tag: 0,
        })
    }

    /// Has the device execute `command`.
    fn execute<C: Command + Clone>(&mut self, command: &C) -> Result<C::Response, Refusal> {
        let Some(port) = self.port else {
            return self.mailbox.execute(command).map_err(|error| match error {
                MailboxError::Returned { code, .. } => Refusal::Returned(code),
                error => Refusal::Failed(unreachable(error)),
            });
        };
        self.tag = self.tag.wrapping_add(1);
        let tunnel = Tunnel {
            port,
            tag: self.tag,
            command: command.clone(),
        };
        match self.mailbox.execute(&tunnel) {
            Ok(Tunnelled::Done(response)) => Ok(response),
            Ok(Tunnelled::Failed(code)) => Err(Refusal::Returned(code)),
            Ok(Tunnelled::Astray) => Err(Refusal::Failed(unreachable(format!(
                "port {port} answers another message"
            )))),
            Err(MailboxError::Returned { code, .. }) => {
                Err(Refusal::Failed(OrchestratorError::Refused {
                    reason: format!(
                        "the switch hands nothing on to port {port}: {code}; is there a device at it?"
                    ),
                }))
            }
            Err(error) => Err(Refusal::Failed(unreachable(error))),
        }
    }
}

fn unreachable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> OrchestratorError {
    OrchestratorError::Unreachable(io::Error::other(error))
}

/// What the device said to `C`, with what to do about it.
fn refused<C: Command>(code: ReturnCode) -> OrchestratorError {
    let hint = match code {
        ReturnCode::Unsupported => {
            "; this mailbox has no FM-API for dynamic capacity: name the one that has (QEMU: 10.1 or newer)"
        }
        _ => "",
    };
    OrchestratorError::Refused {
        reason: format!(
            "the device answers {} ({:04x}h) with {code}{hint}",
            C::NAME,
            C::OPCODE
        ),
    }
}

impl Refusal {
    fn of<C: Command>(self) -> OrchestratorError {
        match self {
            Self::Returned(code) => refused::<C>(code),
            Self::Failed(error) => error,
        }
    }
}

impl<M: Mmio> Orchestrator for FmOrchestrator<M> {
    fn add(&mut self, sizes: &[u64], tag: ExtentTag) -> Result<Vec<Extent>, OrchestratorError> {
        let mut before = None;
        for _ in 0..ATTEMPTS {
            let chosen = match self.choice.choose(sizes) {
                Ok(chosen) => chosen,
                // What the device said of the last ones tells more.
                Err(error) => return Err(before.unwrap_or(error)),
            };
            let extent = |&range| Extent {
                range,
                tag,
                shared_seq: 0,
            };
            let extents: Vec<Extent> = chosen.ranges.iter().map(extent).collect();
            let add = InitiateAdd {
                host: HOST,
                region: chosen.region.index,
                tag,
                selection: Selection::Prescriptive(extents.clone()),
            };
            let offered = self.execute(&add);
            self.choice.take(&chosen.ranges);
            match offered {
                Ok(()) => return Ok(extents),
                // Held, or offered and not answered.
                Err(Refusal::Returned(code @ ReturnCode::InvalidPhysicalAddress)) => {
                    before = Some(refused::<InitiateAdd>(code));
                }
                Err(refusal) => return Err(refusal.of::<InitiateAdd>()),
            }
        }
        Err(before.unwrap_or_else(|| refused::<InitiateAdd>(ReturnCode::InvalidPhysicalAddress)))
    }

    fn held(&mut self, extents: &[Extent]) {
        self.choice.held(extents);
    }

    fn release(&mut self, ranges: &[DpaRange], forced: bool) -> Result<(), OrchestratorError> {
        for range in ranges {
            let release = InitiateRelease {
                host: HOST,
                region: self.choice.region_of(range)?.index,
                tag: ExtentTag::NULL,
                extents: vec![Extent::untagged(*range)],
                forced,
                sanitize: false,
            };
            self.execute(&release)
                .map_err(Refusal::of::<InitiateRelease>)?;
        }
        Ok(())
    }
}
