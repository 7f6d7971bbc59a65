//! A Dynamic Capacity Device, driven through its registers.

#![forbid(unsafe_code)]

mod answer;
mod drain;
pub(crate) mod open;
mod release;

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::address::{DpaRange, HpaWindow};
use crate::capacity::{CapacityDevice, DeviceCounters, DeviceEvent};
use crate::cmd::events::{GetEventInterruptPolicy, SetEventInterruptPolicy};
use crate::error::{DecoderError, DeviceError};
use crate::extent::Extent;
use crate::hdm::{DecodedWindow, Decoders};
use crate::journal::{Answer, Cut, Journal, JournalEntry, MemoryJournal, RecordId, Work};
use crate::mailbox::{Mailbox, MailboxConfig};
use crate::mmio::Mmio;
use crate::region::DcRegion;
use crate::staging::{Prepare, Staging, StagingLimits, TakeWhole};

/// How a device is driven.
pub struct DeviceConfig {
    /// Waiting for the mailbox.
    pub mailbox: MailboxConfig,
    /// Waiting for the rest of a group.
    pub staging: StagingLimits,
    /// Waiting for the device to become ready. Linux: 60 s.
    pub ready_timeout: Duration,
    /// How often the event log is read although Event Status does not ask for it.
    pub drain_interval: Duration,
    /// The host's part of accepting capacity.
    pub prepare: Box<dyn Prepare>,
    /// DC regions, a bit for each index, whose capacity may be shared with other hosts. The
    /// mailbox does not say so: it is in the CDAT (DSMAS flag "shareable").
    pub sharable_regions: u8,
    /// Where unanswered groups are kept. In memory, unless said otherwise.
    pub journal: Box<dyn Journal>,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            mailbox: MailboxConfig::default(),
            staging: StagingLimits::default(),
            ready_timeout: Duration::from_secs(60),
            drain_interval: Duration::from_secs(1),
            prepare: Box::new(TakeWhole),
            sharable_regions: 0,
            journal: Box::<MemoryJournal>::default(),
        }
    }
}

/// A Dynamic Capacity Device behind any [`Mmio`].
pub struct DcDevice<M> {
    mailbox: Mailbox<M>,
    config: DeviceConfig,
    /// Where Event Status is in the device block.
    event_status: u32,
    /// Records that the device's dynamic capacity event log holds; 0 if it does not say.
    log_depth: u32,
    regions: Vec<DcRegion>,
    /// In order of DPA.
    accepted: Vec<Extent>,
    staging: Staging,
    /// See [`JournalEntry`] for these.
    last_read: Vec<RecordId>,
    overflow_counted: u32,
    cuts: VecDeque<Cut>,
    work: VecDeque<Work>,
    answer: Option<Answer>,
    unseen_groups: u32,
    after_truncated: bool,
    /// Whether the device has told an answer out of order from a wrong one.
    tells_order: bool,
    /// Whether `answer` may have reached the device.
    answer_sent: bool,
    /// Whether the journal is behind.
    unsaved: bool,
    /// What a 4803h listed that did not complete.
    unsettled_release: Vec<DpaRange>,
    /// What happened and was not reported yet.
    events: Vec<DeviceEvent>,
    next_drain: Instant,
    counters: DeviceCounters,
}

impl<M: Mmio> DcDevice<M> {
    /// The DC regions, in order of DPA.
    pub fn regions(&self) -> &[DcRegion] {
        &self.regions
    }

    /// The device's own list of accepted extents (4801h), in order of DPA.
    ///
    /// # Errors
    /// As [`crate::extent_list::read`].
    pub fn listed(&mut self) -> Result<Vec<Extent>, DeviceError> {
        let blocks = self
            .regions
            .iter()
            .map(|region| region.len / region.block_size);
        let blocks = blocks.fold(0, u64::saturating_add);
        crate::extent_list::read(&mut self.mailbox, blocks)
    }

    /// Makes `window` reach all DC regions, once and for all: extents come and go without it.
    ///
    /// # Errors
    /// [`DecoderError`]
    pub fn program_decoder(&mut self, window: HpaWindow) -> Result<DecodedWindow, DecoderError> {
        let span = self.decode_span();
        Decoders::find(self.mailbox.mmio())?.program(span, window)
    }

    /// What a committed decoder makes of all DC regions; `None` if there is no such decoder.
    ///
    /// # Errors
    /// [`DecoderError::NoCapability`]
    pub fn decoded(&mut self) -> Result<Option<DecodedWindow>, DecoderError> {
        let span = self.decode_span();
        Ok(Decoders::find(self.mailbox.mmio())?.decoded(span))
    }

    /// Has the dynamic capacity log raise message-signalled interrupts, or not. The other four
    /// logs belong to somebody else and stay as they are. Returns the vector, which the device
    /// chooses.
    ///
    /// # Errors
    /// The mailbox's.
    pub fn enable_interrupts(&mut self, enable: bool) -> Result<u8, DeviceError> {
        let mut policy = self.mailbox.execute(&GetEventInterruptPolicy)?;
        policy.dynamic_capacity = enable.into();
        self.mailbox.execute(&SetEventInterruptPolicy(policy))?;
        let policy = self.mailbox.execute(&GetEventInterruptPolicy)?;
        Ok(policy.dynamic_capacity >> 4)
    }

    /// From the lowest DC region's base to the end of the highest one's decode length.
    pub fn decode_span(&self) -> DpaRange {
        let start = self.regions[0].base;
        let end = self.regions[self.regions.len() - 1].decode_range().end();
        DpaRange {
            start,
            len: end.0 - start.0,
        }
    }

    fn region_of(&self, range: &DpaRange) -> Option<&DcRegion> {
        self.regions
            .iter()
            .find(|region| region.range().contains(range))
    }

    /// Writes down what a new driver would have to know.
    fn save(&mut self) -> Result<(), DeviceError> {
        self.unsaved = true;
        let entry = JournalEntry {
            last_read: self.last_read.clone(),
            overflow_counted: self.overflow_counted,
            cuts: self.cuts.clone(),
            open: self.staging.open_extents().to_vec(),
            discarding: self.staging.is_discarding(),
            work: self.work.clone(),
            answer: self.answer.clone(),
            unseen_groups: self.unseen_groups,
            after_truncated: self.after_truncated,
        };
        self.config
            .journal
            .save(&entry)
            .map_err(DeviceError::Journal)?;
        self.unsaved = false;
        Ok(())
    }

    /// Does what there is to do, in order, until it is done or fails.
    fn work_off(&mut self) -> Result<(), DeviceError> {
        while let Some(work) = self.work.front() {
            match work {
                Work::Answer(_) => {
                    self.answer_front()?;
                    continue;
                }
                &Work::Release(extent) => self.release_requested(&extent),
                &Work::ForcedRelease(extent) => self.forced_release(&extent),
                &Work::RegionUpdated(region) => {
                    self.read_regions()?;
                    self.events.push(DeviceEvent::RegionsUpdated { region });
                }
                &Work::GroupsUnseen(groups) => {
                    self.unseen_groups = self.unseen_groups.saturating_add(groups);
                }
                &Work::Overflow { lost } => {
                    self.catch_up()?;
                    self.events.push(DeviceEvent::Overflow { lost });
                }
            }
            self.work.pop_front();
            self.unsaved = true;
        }
        Ok(())
    }
}

impl<M: Mmio> CapacityDevice for DcDevice<M> {
    fn poll(&mut self) -> Result<Vec<DeviceEvent>, DeviceError> {
        self.settle_release()?;
        if self.unsaved {
            self.save()?;
        }
        self.work_off()?;
        self.read_events(Instant::now())?;
        if self.unsaved {
            self.save()?;
        }
        Ok(std::mem::take(&mut self.events))
    }

    fn release(&mut self, ranges: &[DpaRange]) -> Result<(), DeviceError> {
        self.settle_release()?;
        self.release_ranges(ranges)
    }

    fn accepted(&self) -> &[Extent] {
        &self.accepted
    }

    fn dc_span(&self) -> DpaRange {
        let start = self.regions[0].base;
        let end = self.regions[self.regions.len() - 1].range().end();
        DpaRange {
            start,
            len: end.0 - start.0,
        }
    }

    fn block_size(&self) -> u64 {
        self.regions
            .iter()
            .map(|region| region.block_size)
            .max()
            .unwrap_or(0)
    }

    fn sanitizes(&self, range: &DpaRange) -> bool {
        self.region_of(range).is_some_and(|region| region.sanitizes)
    }

    fn shares(&self, range: &DpaRange) -> bool {
        let sharable = self.config.sharable_regions;
        let bit = |index: u8| 1u8.checked_shl(index.into()).unwrap_or(0);
        self.region_of(range)
            .is_some_and(|region| sharable & bit(region.index) != 0)
    }

    fn counters(&self) -> DeviceCounters {
        let mailbox = self.mailbox.counters();
        DeviceCounters {
            commands: mailbox.commands,
            timeouts: mailbox.timeouts,
            retries: mailbox.retries,
            ..self.counters
        }
    }
}
