//! A whole Dynamic Capacity Device in software, below the mailbox protocol.
//!
//! The driver reaches it through registers only, so that the code under test is the code that
//! drives hardware. It does what QEMU's device cannot: logs of any depth, More in responses,
//! generation numbers, tags and sharing, forced release, slow doorbells, faults on demand. And it
//! watches its host: answers to nothing, answers out of order and broken mailbox protocol are
//! written down in an [`Audit`] instead of crashing the device.
//!
//! [`SoftwareDevice::fabric`] is the fabric manager's side of it, [`SoftwareDevice::memory`] the
//! memory itself. What it keeps outlives its host, as on a real device: a driver can be dropped
//! and another one opened.

#![forbid(unsafe_code)]

mod audit;
mod capacity;
mod commands;
mod config;
mod decoders;
mod event_log;
mod fabric;
mod fault;
mod mailbox;
mod memory;
mod registers;
mod remote;
mod selection;
mod switch;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::address::{Dpa, DpaRange, Hpa};
use crate::cmd::events::EventInterruptPolicy;
use capacity::Capacity;
use decoders::Decoders;
use event_log::EventLog;
use mailbox::MailboxRegisters;
use memory::Memory;

pub use audit::{AnswerAudit, Audit};
pub use config::{DEFAULT_BLOCK, ModelConfig, ModelRegion};
pub use fabric::{AddPolicy, AddRequest, Fabric, FabricError, ReleasePolicy, SlowOffer};
pub use fault::{Fault, FaultKind};
pub use registers::ModelMmio;
pub use remote::{RemoteFabric, RemoteMmio};
pub use switch::SwitchMmio;

/// A software device. Clones are the same device.
#[derive(Clone)]
pub struct SoftwareDevice {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    memory: Arc<Memory>,
}

/// The device behind its lock.
struct State {
    config: ModelConfig,
    ready_at: Instant,
    mailbox: MailboxRegisters,
    /// Informational, warning, failure, fatal, dynamic capacity.
    logs: [EventLog; 5],
    interrupts: EventInterruptPolicy,
    capacity: Capacity,
    decoders: Decoders,
    faults: Vec<Fault>,
    /// Whether Event Status reads as 0 whatever the logs hold.
    mute: bool,
    /// The host's idea of the time, and when it told.
    clock: Option<(u64, Instant)>,
    audit: Audit,
}

impl State {
    /// The time that event records carry; 0 until the host has told it.
    fn timestamp(&self) -> u64 {
        self.clock
            .map_or(0, |(nanos, told)| nanos + told.elapsed().as_nanos() as u64)
    }
}

impl SoftwareDevice {
    /// A device that has just been powered on: nothing is accepted, nothing offered.
    ///
    /// # Errors
    /// The system's, if it has no memory file to give.
    pub fn new(config: ModelConfig) -> io::Result<Self> {
        let regions = config.regions();
        let start = regions
            .first()
            .map_or(Dpa(config.static_len), |region| region.base);
        let end = regions
            .last()
            .map_or(start, |region| region.decode_range().end());
        let span = DpaRange {
            start,
            len: end.0 - start.0,
        };
        let memory = Arc::new(Memory::new(span)?);
        let depth = usize::from(config.event_log_depth);
        let sharable = config
            .dc_regions
            .iter()
            .map(|region| region.sharable)
            .collect();
        let state = State {
            ready_at: Instant::now() + config.ready_after,
            mailbox: MailboxRegisters::new(config.mailbox_payload),
            logs: std::array::from_fn(|_| EventLog::new(depth, config.qemu_quirks)),
            interrupts: EventInterruptPolicy {
                informational: 0,
                warning: 0,
                failure: 0,
                fatal: 0,
                dynamic_capacity: 0,
            },
            capacity: Capacity::new(
                regions,
                sharable,
                config.max_extents as usize,
                config.qemu_quirks,
                Arc::clone(&memory),
            ),
            decoders: Decoders::new(),
            faults: Vec::new(),
            mute: false,
            clock: None,
            audit: Audit::default(),
            config,
        };
        Ok(Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                memory,
            }),
        })
    }

    /// The device's registers, as a host sees them.
    pub fn mmio(&self) -> ModelMmio {
        ModelMmio::new(self.clone())
    }

    /// The fabric manager's side of the device.
    pub fn fabric(&self) -> Fabric {
        Fabric::new(self.clone())
    }

    /// The fabric manager's side as a mailbox: of a switch that has the device behind `port`, or
    /// of the device itself.
    pub fn fm_mailbox(&self, port: Option<u8>) -> SwitchMmio {
        SwitchMmio::new(self.fabric(), port)
    }

    /// The device's memory, a memfd: offset 0 is the lowest DC region's base.
    /// It has holes where nothing was ever written; they read as zeroes.
    pub fn memory(&self) -> BorrowedFd<'_> {
        self.shared.memory.file()
    }

    /// What [`memory`](Self::memory) covers: all DC regions with the space between them.
    pub fn memory_span(&self) -> DpaRange {
        self.shared.memory.span
    }

    /// What a host address comes to, by the decoders as they are; `None` if it is not decoded.
    pub fn decode(&self, hpa: Hpa) -> Option<Dpa> {
        self.lock().decoders.decode(hpa)
    }

    /// What the device has seen its host do.
    pub fn audit(&self) -> Audit {
        let state = self.lock();
        Audit {
            groups_pending: state.capacity.pending_groups(),
            records_in_log: state.logs[DYNAMIC_CAPACITY].len(),
            accepted: state.capacity.accepted().to_vec(),
            generation: state.capacity.generation(),
            ..state.audit.clone()
        }
    }

    /// From now on, the time from a doorbell being rung until its command is done.
    pub fn set_doorbell_delay(&self, delay: Duration) {
        self.lock().config.doorbell_delay = delay;
    }

    /// Makes the device misbehave; see [`Fault`].
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Forgets the faults that have not struck yet.
    pub fn clear_faults(&self) {
        self.lock().faults.clear();
    }

    /// Whether a command is running that only a reset ends.
    pub fn is_hung(&self) -> bool {
        self.lock().mailbox.is_hung()
    }

    /// While set, Event Status reads as 0 whatever the logs hold.
    pub fn mute_event_status(&self, mute: bool) {
        self.lock().mute = mute;
    }

    /// What a reset of the host does: registers start anew, logs, offers and accepted extents
    /// stay. Ends a hanging command.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.mailbox = MailboxRegisters::new(state.config.mailbox_payload);
        state.decoders = Decoders::new();
        state.capacity.forget_partial_answer();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Index of the dynamic capacity event log.
const DYNAMIC_CAPACITY: usize = 4;
