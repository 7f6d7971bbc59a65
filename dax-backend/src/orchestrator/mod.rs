//! Asking for capacity, which CXL leaves to the fabric manager.
//!
//! [`qmp`] asks QEMU's monitor, [`fm`] a mailbox that takes the FM-API; the software device has its
//! own. `choice` finds free ranges for those that want to be told which.
//!
//! There is no command by which a host asks its device for more: whoever wants capacity asks
//! an orchestrator (FM-API 5604h/5605h, Redfish, QMP, or the software device's fabric side),
//! and the answer comes as an event of the device, perhaps smaller, perhaps never.

#![forbid(unsafe_code)]

mod choice;
pub mod fm;
pub mod qmp;

use std::path::Path;

use thiserror::Error;

use crate::address::DpaRange;
use crate::extent::{Extent, ExtentTag};

/// Whoever adds capacity to the device, and takes it away.
pub trait Orchestrator: Send {
    /// Offers one extent for each of `sizes` (bytes) to the host, all in one More group.
    /// Returns what was offered; the host has not answered yet.
    ///
    /// # Errors
    /// [`OrchestratorError`]: nothing was offered.
    fn add(&mut self, sizes: &[u64], tag: ExtentTag) -> Result<Vec<Extent>, OrchestratorError>;

    /// Offers capacity that is shared with other hosts, under `tag`: one extent for each of
    /// `sizes`, in this order, in one More group. If another host has the tag already, all of
    /// that is offered, whatever the sizes. `content` is what another host has written there.
    ///
    /// # Errors
    /// [`OrchestratorError`]: nothing was offered.
    fn add_shared(
        &mut self,
        _sizes: &[u64],
        _tag: ExtentTag,
        _content: Option<&Path>,
    ) -> Result<Vec<Extent>, OrchestratorError> {
        let reason = "this fabric manager can't be asked for shared capacity".to_owned();
        Err(OrchestratorError::Refused { reason })
    }

    /// What the host holds at the moment. Said before [`Self::add`], for orchestrators that must
    /// choose the ranges they offer.
    fn held(&mut self, _extents: &[Extent]) {}

    /// Asks the host for `ranges` back, or with `forced` takes them at once.
    ///
    /// # Errors
    /// [`OrchestratorError`]: nothing was asked.
    fn release(&mut self, ranges: &[DpaRange], forced: bool) -> Result<(), OrchestratorError>;
}

/// Why an orchestrator did not do what was asked.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OrchestratorError {
    /// The request makes no sense to the device.
    #[error("the fabric refuses: {reason}")]
    Refused {
        /// In words, with the values that decide it.
        reason: String,
    },
    /// There is not that much to give.
    #[error("the fabric has no {wanted} bytes to give; {available} bytes are free")]
    NoCapacity {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes free.
        available: u64,
    },
    /// The orchestrator could not be reached.
    #[error("the fabric manager cannot be reached")]
    Unreachable(#[source] std::io::Error),
}
