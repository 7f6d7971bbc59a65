//! What can go wrong between driver and device.

#![forbid(unsafe_code)]

use std::io;

use thiserror::Error;

use crate::address::DpaRange;
use crate::extent::ExtentTag;
use crate::mailbox::MailboxError;

/// A device that cannot be driven.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A register block does not have what every CXL memory device has.
    #[error("the device has no {what}: it is not a CXL memory device, or it is gone")]
    NoCapability {
        /// Name of the missing capability.
        what: &'static str,
    },
    /// A capability lies outside its register block.
    #[error(
        "{what} at {offset:#x}+{len:#x} lies outside the register block of {block_len:#x} bytes"
    )]
    CapabilityOutsideBlock {
        /// Name of the capability.
        what: &'static str,
        /// Where it claims to be.
        offset: u32,
        /// How long it claims to be, in bytes.
        len: u32,
        /// Length of the block in bytes.
        block_len: u32,
    },
    /// A capability lies where no register begins: they have 8 bytes.
    #[error("{what} at {offset:#x} is not aligned to the 8 bytes of its registers")]
    CapabilityMisaligned {
        /// Name of the capability.
        what: &'static str,
        /// Where it claims to be.
        offset: u32,
    },
    /// The mailbox is smaller than CXL allows.
    #[error("a mailbox payload of 2^{log2} bytes is not usable: CXL has 256 bytes to 1 MiB")]
    PayloadSize {
        /// What the capabilities register says.
        log2: u8,
    },
    /// The device did not become ready.
    #[error("the device is not ready after {seconds} s: memory device status {status:#x}")]
    NotReady {
        /// How long was waited.
        seconds: u64,
        /// The register's last value.
        status: u64,
    },
    /// The device is an ordinary memory device.
    #[error(
        "the device has no dynamic capacity: its command effects log lacks {opcode:#06x}; ordinary CXL memory is \
         for the kernel's cxl_pci to drive, and is then served with `dcm serve --dax /dev/daxX.Y` or \
         `--node N,SIZE`"
    )]
    NotDynamicCapacity {
        /// The first command that is missing.
        opcode: u16,
    },
    /// Talking to it failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl From<MailboxError> for OpenError {
    fn from(error: MailboxError) -> Self {
        Self::Device(error.into())
    }
}

/// A device that does not do as the specification says, or a request that it would refuse.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A mailbox command failed.
    #[error(transparent)]
    Mailbox(#[from] MailboxError),
    /// The extent list kept changing while it was read.
    #[error("the extent list changed during each of {attempts} attempts to read it")]
    ExtentListUnstable {
        /// How often it was tried.
        attempts: u32,
    },
    /// The extent list ends before its own total.
    #[error("the extent list stops at {read} of {total} extents")]
    ExtentListTruncated {
        /// Extents read.
        read: u32,
        /// Extents the device claims to have.
        total: u32,
    },
    /// There cannot be so many extents: each has a block of its own.
    #[error("the extent list claims {total} extents, and the DC regions have {blocks} blocks")]
    ExtentListTooLong {
        /// Extents the device claims to have.
        total: u32,
        /// Blocks in all its DC regions.
        blocks: u64,
    },
    /// A DC region makes no sense.
    #[error("DC region {index} is unusable: {reason}")]
    BadRegion {
        /// Index of the region.
        index: u8,
        /// What is wrong with it, with the values that decide it.
        reason: String,
    },
    /// The event log does not end.
    #[error("the event log still has records after {reads} reads: the device does not clear them")]
    EventLogEndless {
        /// How often it was read.
        reads: u32,
    },
    /// The device lists something else than what it was told.
    #[error("{range} was answered, but the device does not list it as accepted")]
    NotListed {
        /// What is missing.
        range: DpaRange,
    },
    /// Asked to release memory that is not held.
    #[error("{range} cannot be released: it is not held")]
    NotHeld {
        /// What was asked.
        range: DpaRange,
    },
    /// Asked to release memory that is not whole blocks.
    #[error("{range} cannot be released: it is not a multiple of the {block_size:#x}-byte block")]
    Misaligned {
        /// What was asked.
        range: DpaRange,
        /// Block size of the DC region in bytes.
        block_size: u64,
    },
    /// Asked to release a part of a tag group.
    #[error("{range} cannot be released alone: tag {tag} is given back as a whole")]
    PartOfTagGroup {
        /// What was asked.
        range: DpaRange,
        /// The tag that holds more.
        tag: ExtentTag,
    },
    /// The journal could not be written, so that a crash could lose a group.
    #[error(
        "the journal of unanswered groups cannot be written; groups stay unanswered until it can"
    )]
    Journal(#[source] io::Error),
}

/// The way out where decoders are not as they should be: what the firmware or a driver has committed goes
/// with a reset, and comes back if the kernel's own driver of CXL windows sees the device first.
const RESET: &str = "reset the device (as root: echo 1 > /sys/bus/pci/devices/BDF/reset), or start the kernel with \
                     module_blacklist=cxl_acpi, so that it leaves decoders alone";

/// A decoder that cannot be programmed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DecoderError {
    /// The component registers have no HDM decoder capability.
    #[error("the component registers have no HDM decoder capability")]
    NoCapability,
    /// All decoders are taken.
    #[error("all {count} HDM decoders are committed to other memory: {RESET}")]
    NoneFree {
        /// How many there are.
        count: u8,
    },
    /// The window is too small.
    #[error(
        "a window of {window:#x} bytes cannot hold the {needed:#x} bytes of the DC regions: have the firmware \
         make it larger (QEMU: cxl-fmw.0.size)"
    )]
    WindowTooSmall {
        /// Bytes the window has.
        window: u64,
        /// Bytes to decode.
        needed: u64,
    },
    /// A decoder can only decode multiples of 256 MiB.
    #[error("{what} {value:#x} is not a multiple of 256 MiB")]
    Unaligned {
        /// What is not aligned.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Decoders go up in HPA and DPA, and this one would not.
    #[error(
        "decoder {decoder} ends at {what} {end:#x}, above {start:#x}: decoders are committed in rising order; {RESET}"
    )]
    OutOfOrder {
        /// The decoder in the way.
        decoder: u8,
        /// `HPA` or `DPA`.
        what: &'static str,
        /// Where it ends.
        end: u64,
        /// Where the new one would start.
        start: u64,
    },
    /// The device refused.
    #[error("the device refuses to commit decoder {decoder}: control {control:#x}; {RESET}")]
    CommitFailed {
        /// Which decoder.
        decoder: u8,
        /// The control register's value.
        control: u32,
    },
    /// The device did not answer.
    #[error("decoder {decoder} is not committed after {millis} ms: control {control:#x}; {RESET}")]
    CommitTimeout {
        /// Which decoder.
        decoder: u8,
        /// How long was waited.
        millis: u64,
        /// The control register's value.
        control: u32,
    },
}
