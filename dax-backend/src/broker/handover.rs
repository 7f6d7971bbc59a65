//! What is marked and free goes to the device.
#![forbid(unsafe_code)]

use super::recall::ActiveRecall;
use super::receipt::{DpaSpan, Receipt};
use super::server::Broker;
use crate::address::DpaRange;

impl Broker {
    /// Gives the device what is marked and free, outside of any client's answer.
    pub(super) fn release_marked(&mut self) {
        let mut recall = self.recalls.active.take();
        let mut error = None;
        let released = self.release_to_device(&mut error);
        if let Some(recall) = &mut recall {
            credit(recall, released, |receipt| &mut receipt.returned_free);
            recall.device_error = error.or(recall.device_error.take());
        }
        self.recalls.active = recall;
    }

    /// Wipes and releases what is marked and free. What the device does not
    /// take becomes ordinary free memory again.
    pub(super) fn release_to_device(&mut self, error: &mut Option<String>) -> Vec<DpaRange> {
        let parts = self.table.releasable();
        if parts.is_empty() {
            return Vec::new();
        }
        for slots in parts.iter().flat_map(|(_, slots)| slots) {
            self.window.discard(*slots);
        }
        let ranges: Vec<DpaRange> = parts.iter().map(|(range, _)| *range).collect();
        if let Err(refused) = self.device.release(&ranges) {
            *error = Some(describe(&refused));
            self.device_error.clone_from(error);
        }
        self.sync_capacity();
        let mut released = Vec::new();
        for (range, slots) in parts {
            if self.table.accepted_in(&range) == 0 {
                released.push(range);
            } else {
                self.table.unmark(&slots);
            }
        }
        released
    }
}

/// Books what went back to the device under one of the receipt's steps.
pub(super) fn credit(
    recall: &mut ActiveRecall,
    released: Vec<DpaRange>,
    step: impl FnOnce(&mut Receipt) -> &mut u64,
) {
    let bytes: u64 = released.iter().map(|range| range.len).sum();
    recall.receipt.returned += bytes;
    *step(&mut recall.receipt) += bytes;
    recall
        .receipt
        .ranges
        .extend(released.into_iter().map(DpaSpan::from));
    // Whatever was claimed is released now, or unmarked because the device refused.
    recall.claimed = 0;
}

/// An error with its causes, in one line.
pub(super) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}
