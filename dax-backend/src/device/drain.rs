//! Draining the event log: read, stage, write down, clear, and only then act.
//!
//! Records are cleared before the group they belong to is answered, because a group may be larger
//! than the log. The journal bridges the gap: see [`crate::journal`].

#![forbid(unsafe_code)]

use std::time::Instant;

use super::DcDevice;
use crate::capacity::DeviceEvent;
use crate::cmd::events::{
    ClearEventRecords, ClearEventRecordsHeader, EventLogKind, EventRecords, GetEventRecords,
};
use crate::error::DeviceError;
use crate::event_record::{RawRecord, RecordKind};
use crate::extent::Extent;
use crate::journal::{Cut, RecordId, Work};
use crate::mmio::{Mmio, RegisterBlock};
use crate::regs::device_status::EventStatus;
use crate::staging::{Closed, StagingAction, StagingEvent};

/// Reads of the log in one go, after which the device must be writing as fast as we read.
const MAX_READS: u32 = 1 << 16;
/// Drains in one poll. What comes during one sets Event Status again; a bit that is stuck must not
/// keep the caller here.
const MAX_DRAINS: u32 = 4;
/// Reads that may bring nothing but records that were cleared already.
const MAX_STALE_READS: u32 = 2;

impl<M: Mmio> DcDevice<M> {
    /// Reads the log if the device says there is something in it, or if nobody has looked for a
    /// while: interrupts and status bits are edges that can be missed. Then looks after time-outs,
    /// so that a group whose end was in the log all the time is not given up.
    pub(super) fn read_events(&mut self, now: Instant) -> Result<(), DeviceError> {
        let mut due = now >= self.next_drain;
        for _ in 0..MAX_DRAINS {
            let raw = self
                .mailbox
                .mmio()
                .read64(RegisterBlock::Device, self.event_status);
            if !due && !EventStatus::from_bits(raw).dynamic_capacity() {
                break;
            }
            due = false;
            self.drain(now, false)?;
        }
        let action = self.staging.step(now, StagingEvent::Tick);
        self.act(action);
        if self.unsaved {
            self.save()?;
        }
        self.work_off()
    }

    /// Reads the log until it is empty. `opening` says that the records may be older than the
    /// extents that were adopted.
    pub(super) fn drain(&mut self, now: Instant, opening: bool) -> Result<(), DeviceError> {
        self.next_drain = now + self.config.drain_interval;
        let mut stale = 0;
        for _ in 0..MAX_READS {
            let read = self.mailbox.execute(&GetEventRecords {
                log: EventLogKind::DynamicCapacity,
            })?;
            let ids: Vec<RecordId> = read.records.iter().map(RecordId::from).collect();
            if !ids.is_empty() && ids.iter().all(|id| self.last_read.contains(id)) {
                stale += 1;
                if stale > MAX_STALE_READS {
                    return Err(DeviceError::EventLogEndless { reads: stale });
                }
            }
            self.stage(now, &read);
            if read.records.is_empty() {
                return self.work_off();
            }
            self.last_read = ids;
            self.save()?;
            self.clear(&read.records)?;
            if opening {
                self.drop_answered_groups();
            }
            self.work_off()?;
        }
        Err(DeviceError::EventLogEndless { reads: MAX_READS })
    }

    /// Stages what one read brought, except what an earlier read has brought already.
    fn stage(&mut self, now: Instant, read: &EventRecords) {
        let seen_before = |record: &RawRecord| self.last_read.contains(&RecordId::from(record));
        let staged = read
            .records
            .iter()
            .filter(|record| seen_before(record))
            .count();
        if staged == 0 {
            self.overflow_counted = 0;
        }
        if let Some(lost) = read.overflow {
            self.count_overflow(u32::from(lost.max(1)), staged as u32);
        }
        self.cut_where_due(now);
        for record in &read.records {
            if self.last_read.contains(&RecordId::from(record)) {
                continue;
            }
            self.counters.records += 1;
            self.stage_record(now, record);
            for cut in &mut self.cuts {
                cut.after = cut.after.saturating_sub(1);
            }
            self.cut_where_due(now);
        }
        if read.records.is_empty() {
            while let Some(cut) = self.cuts.pop_front() {
                self.records_lost(now, cut);
            }
        }
    }

    /// The log has run over, losing `lost` records since it was last cleared. `staged` of the
    /// records in it are staged already.
    fn count_overflow(&mut self, lost: u32, staged: u32) {
        let more = lost.saturating_sub(self.overflow_counted);
        if self.overflow_counted == 0 {
            self.counters.overflows += 1;
            // A log that has run over is full, and nothing was cleared since: so many records
            // from here on are older than those that were lost.
            let after = match self.log_depth {
                0 => u32::MAX,
                depth => depth.saturating_sub(staged),
            };
            self.cuts.push_back(Cut { after, lost });
        } else if let Some(cut) = self.cuts.back_mut() {
            cut.lost += more;
        } else if more > 0 {
            self.work.push_back(Work::Overflow { lost: more });
            self.work.push_back(Work::GroupsUnseen(more));
        }
        self.overflow_counted = lost;
    }

    fn cut_where_due(&mut self, now: Instant) {
        while let Some(cut) = self.cuts.pop_front_if(|cut| cut.after == 0) {
            self.records_lost(now, cut);
        }
    }

    fn stage_record(&mut self, now: Instant, record: &RawRecord) {
        match record.decode() {
            RecordKind::Add { extent, more } => {
                let action = self.staging.step(now, StagingEvent::Add { extent, more });
                self.act(action);
            }
            RecordKind::Release { extent } => self.work.push_back(Work::Release(extent)),
            RecordKind::ForcedRelease { extent } => {
                self.work.push_back(Work::ForcedRelease(extent));
            }
            RecordKind::RegionUpdated { region } => {
                self.work.push_back(Work::RegionUpdated(region));
            }
            RecordKind::Unknown { .. } => self.counters.records_unknown += 1,
        }
    }

    /// Records are missing here: the open group ends, and whole groups may be among the lost.
    fn records_lost(&mut self, now: Instant, cut: Cut) {
        let open = !self.staging.open_extents().is_empty();
        let action = self.staging.step(now, StagingEvent::RecordsLost);
        self.act(action);
        self.work.push_back(Work::Overflow { lost: cut.lost });
        // At least one of the lost records belongs to the open group: its end.
        self.work
            .push_back(Work::GroupsUnseen(cut.lost - u32::from(open)));
    }

    /// Finds out what lost records may have told: regions that have changed, and extents that are
    /// gone. Lost release requests are for the fabric manager to repeat.
    pub(super) fn catch_up(&mut self) -> Result<(), DeviceError> {
        let before = self.regions.clone();
        self.read_regions()?;
        let listed = self.listed()?;
        for region in &self.regions {
            if !before.contains(region) {
                let region = region.index;
                self.events.push(DeviceEvent::RegionsUpdated { region });
            }
        }
        for held in self.accepted.clone() {
            let mut gone = vec![held.range];
            for extent in &listed {
                gone = extent.range.cut_from(&gone);
            }
            for range in gone {
                self.forced_release(&Extent { range, ..held });
            }
        }
        Ok(())
    }

    fn act(&mut self, action: StagingAction) {
        match action {
            StagingAction::Wait => {}
            StagingAction::Answer(group) => {
                match group.closed {
                    Closed::TimedOut => self.counters.group_timeouts += 1,
                    Closed::TooLarge | Closed::OutOfMemory => self.counters.groups_too_large += 1,
                    Closed::Complete | Closed::Truncated => {}
                }
                self.work.push_back(Work::Answer(group));
                self.unsaved = true;
            }
            StagingAction::Discarded { last } => {
                self.counters.records_discarded += 1;
                self.unsaved = true;
                // The device may take the late end of a chain for a group of its own.
                if last {
                    self.work.push_back(Work::GroupsUnseen(1));
                }
            }
        }
    }

    fn clear(&mut self, records: &[RawRecord]) -> Result<(), DeviceError> {
        let handles: Vec<u16> = records.iter().map(|record| record.handle.get()).collect();
        let room = self.mailbox.payload_len() - size_of::<ClearEventRecordsHeader>();
        let per_command = (room / size_of::<u16>()).min(ClearEventRecords::MAX_CLEAR);
        for handles in handles.chunks(per_command) {
            let log = EventLogKind::DynamicCapacity;
            self.mailbox.execute(&ClearEventRecords { log, handles })?;
        }
        Ok(())
    }

    /// A group with an extent that the device listed when it was opened has been answered, by a
    /// driver that did not come to clear its records. Answering again would answer the next one.
    fn drop_answered_groups(&mut self) {
        let accepted = &self.accepted;
        let mut dropped = 0;
        self.work.retain(|work| {
            let Work::Answer(group) = work else {
                return true;
            };
            let answered = group
                .extents
                .iter()
                .any(|offered| accepted.iter().any(|held| held.range == offered.range));
            if answered {
                dropped += group.extents.len() as u64;
            }
            !answered
        });
        self.counters.records_discarded += dropped;
    }
}
