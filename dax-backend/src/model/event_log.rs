//! One event log of the device.

#![forbid(unsafe_code)]

use std::collections::VecDeque;

use zerocopy::IntoBytes;

use crate::cmd::ReturnCode;
use crate::cmd::events::{EventRecordsHeader, MORE_RECORDS, OVERFLOW};
use crate::event_record::RawRecord;

/// Records until they are cleared. What does not fit is lost, and counted.
pub(super) struct EventLog {
    depth: usize,
    /// See [`ModelConfig::qemu_quirks`](super::ModelConfig::qemu_quirks).
    quirks: bool,
    records: VecDeque<RawRecord>,
    last_handle: u16,
    lost: u16,
    first_lost: u64,
    last_lost: u64,
}

impl EventLog {
    pub(super) fn new(depth: usize, quirks: bool) -> Self {
        Self {
            depth,
            quirks,
            records: VecDeque::new(),
            last_handle: 0,
            lost: 0,
            first_lost: 0,
            last_lost: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.records.len()
    }

    /// Writes a record, or loses it if the log is full. The handle is the log's own.
    pub(super) fn push(&mut self, mut record: RawRecord, timestamp: u64) {
        if self.records.len() >= self.depth {
            if self.lost == 0 {
                self.first_lost = timestamp;
            }
            self.lost = self.lost.saturating_add(1);
            self.last_lost = timestamp;
            return;
        }
        self.last_handle = self.last_handle.checked_add(1).unwrap_or(1);
        record.handle = self.last_handle.into();
        record.timestamp = timestamp.into();
        self.records.push_back(record);
    }

    /// The output of Get Event Records: the oldest records that `payload` bytes hold.
    pub(super) fn read(&self, payload: usize) -> Vec<u8> {
        let head = size_of::<EventRecordsHeader>();
        let count = self
            .records
            .len()
            .min((payload - head) / size_of::<RawRecord>());
        let mut flags = 0;
        if self.lost > 0 {
            flags |= OVERFLOW;
        }
        if self.records.len() > count || self.quirks && count > 0 {
            flags |= MORE_RECORDS;
        }
        let header = EventRecordsHeader {
            flags,
            reserved: 0,
            overflow_count: self.lost.into(),
            first_overflow: self.first_lost.into(),
            last_overflow: self.last_lost.into(),
            count: (count as u16).into(),
            reserved2: [0; 10],
        };
        let mut output = header.as_bytes().to_vec();
        for record in self.records.iter().take(count) {
            output.extend_from_slice(record.as_bytes());
        }
        output
    }

    /// Clear Event Records: the handles must be the oldest ones, in order.
    pub(super) fn clear(&mut self, handles: &[u16]) -> Result<(), ReturnCode> {
        let oldest = self
            .records
            .iter()
            .take(handles.len())
            .map(|record| record.handle.get());
        if !oldest.eq(handles.iter().copied()) {
            return Err(if self.quirks {
                ReturnCode::InvalidInput
            } else {
                ReturnCode::InvalidHandle
            });
        }
        self.records.drain(..handles.len());
        (self.lost, self.first_lost, self.last_lost) = (0, 0, 0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    #[test]
    fn a_full_log_loses_the_newest_and_says_so_until_cleared() {
        let mut log = EventLog::new(2, false);
        for timestamp in 1..=4 {
            log.push(RawRecord::new_zeroed(), timestamp);
        }
        let output = log.read(2048);
        assert_eq!((output[0], output[2], output[20]), (OVERFLOW, 2, 2));
        assert_eq!((output[4], output[12]), (3, 4));
        assert_eq!(log.clear(&[2, 1]), Err(ReturnCode::InvalidHandle));
        assert_eq!(log.clear(&[1]), Ok(()));
        assert_eq!(log.read(2048)[0], 0);
        assert_eq!(log.len(), 1);
    }

    #[test]
    fn handles_are_never_zero() {
        let mut log = EventLog::new(1, false);
        log.last_handle = u16::MAX;
        log.push(RawRecord::new_zeroed(), 0);
        assert_eq!(log.records[0].handle.get(), 1);
    }
}
