//! What a broker needs of a device that lends capacity.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::address::DpaRange;
use crate::error::DeviceError;
use crate::extent::{Extent, ExtentTag};
use crate::staging::RejectReason;

/// A device that lends its memory in extents, seen from above the mailbox.
///
/// One thread owns it: there is one mailbox, and one command is in flight at a time.
pub trait CapacityDevice: Send {
    /// Reads what the device has to say, answers every complete group exactly once,
    /// and returns what came of it, in order. Never waits for events.
    ///
    /// Events that precede an error are not lost: the next call returns them.
    ///
    /// # Errors
    /// [`DeviceError`] if the device does not do as the specification says. The device stays
    /// usable: calling again later picks up where this call left off.
    fn poll(&mut self) -> Result<Vec<DeviceEvent>, DeviceError>;

    /// Gives `ranges` back (4803h): any block-aligned parts of untagged extents, whole groups
    /// of tagged ones. No processor may touch the memory any more when this is called.
    ///
    /// # Errors
    /// [`DeviceError::NotHeld`], [`DeviceError::Misaligned`] and [`DeviceError::PartOfTagGroup`]
    /// before anything was sent; otherwise what the device said, and nothing was released unless
    /// [`accepted`](Self::accepted) has shrunk.
    fn release(&mut self, ranges: &[DpaRange]) -> Result<(), DeviceError>;

    /// The extents that are held, in order of DPA.
    fn accepted(&self) -> &[Extent];

    /// From the lowest DC region's base to the highest one's end: what a window must cover.
    fn dc_span(&self) -> DpaRange;

    /// The largest block size of its DC regions, in bytes: ranges that are multiples of it
    /// are aligned in every region.
    fn block_size(&self) -> u64;

    /// Whether memory newly accepted at `range` is known to be zero (CXL: region flag
    /// "sanitize on release"). Everything else must be zeroed before its first use.
    fn sanitizes(&self, range: &DpaRange) -> bool;

    /// Whether memory at `range` may be shared with other hosts (CDAT, DSMAS flag "shareable").
    /// Sequence numbers other than 0 say so too; a tag of one extent has none.
    fn shares(&self, _range: &DpaRange) -> bool {
        false
    }

    /// What happened so far.
    fn counters(&self) -> DeviceCounters;
}

/// What a [`CapacityDevice::poll`] found out.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceEvent {
    /// Capacity came: the device has confirmed the answer, the memory may be used.
    /// Extents of one tag are in the order of their sequence numbers.
    Accepted {
        /// What was accepted of one group, which may be parts of what was offered.
        extents: Vec<Extent>,
    },
    /// Offered capacity was turned down, in the same answer that accepted the rest of its group.
    Rejected {
        /// What was offered, and why it was not taken.
        extents: Vec<(Extent, RejectReason)>,
    },
    /// The device asks for held capacity back; it waits for as long as it takes.
    /// One event for each held extent concerned, cut to what was asked if it is untagged,
    /// whole if it is tagged.
    ReleaseRequested {
        /// Part of a held extent, block-aligned.
        range: DpaRange,
        /// Its tag.
        tag: ExtentTag,
    },
    /// The device has taken held capacity away. It is gone already.
    ForcedRelease {
        /// What was held and is not any more.
        range: DpaRange,
        /// Its tag.
        tag: ExtentTag,
    },
    /// A DC region has changed; [`CapacityDevice::block_size`] may say something else now.
    RegionsUpdated {
        /// Index of the region, 0 to 7.
        region: u8,
    },
    /// The device's event log ran over and records are lost.
    Overflow {
        /// How many, as the device counts them.
        lost: u32,
    },
}

/// Counts since the device was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DeviceCounters {
    /// Groups answered with 4802h, each once.
    pub groups_answered: u64,
    /// 4802h commands sent; more than groups when an answer exceeds one payload or is repeated
    /// with fewer extents.
    pub answer_commands: u64,
    /// Extents (or parts) accepted.
    pub extents_accepted: u64,
    /// Extents rejected.
    pub extents_rejected: u64,
    /// Extents found accepted when the device was opened.
    pub extents_adopted: u64,
    /// Bytes accepted.
    pub bytes_accepted: u64,
    /// Bytes released with 4803h.
    pub bytes_released: u64,
    /// Bytes lost to forced release.
    pub bytes_forced: u64,
    /// Event records read.
    pub records: u64,
    /// Event records that made no sense: other UUID, unknown type.
    pub records_unknown: u64,
    /// Add records dropped because their group was closed early.
    pub records_discarded: u64,
    /// Times the event log had run over.
    pub overflows: u64,
    /// Groups closed because their end did not come in time.
    pub group_timeouts: u64,
    /// Groups answered with nothing because more extents came than may be staged.
    pub groups_too_large: u64,
    /// Mailbox commands executed.
    pub commands: u64,
    /// Mailbox commands that did not complete in time.
    pub timeouts: u64,
    /// Mailbox commands repeated because the device was busy.
    pub retries: u64,
    /// Release requests for memory that is not held, ignored.
    pub releases_not_held: u64,
}
