//! Why something was refused: a connection, or memory asked back.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a broker turned a connection away; arg0 of [`Kind::Refused`](super::protocol::Kind::Refused).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
#[repr(u64)]
pub enum RefusedCode {
    /// The protocol versions differ.
    #[error(
        "the broker speaks another protocol version: use dcm, library and broker of one release"
    )]
    Version = 1,
    /// `SO_PEERCRED` says that this user is not admitted.
    #[error(
        "the broker does not admit this user, or takes no orders of it (status, top, add and \
         release are for its own user and root): use sudo, or serve a broker of your own"
    )]
    User = 2,
    /// The first message was no valid hello.
    #[error("the broker could not read the hello")]
    Malformed = 3,
    /// The broker ran out of descriptors or memory for another client.
    #[error("the broker has no room for another client")]
    Full = 4,
    /// A client rejoins that this broker does not know, or that claims what it does not have.
    #[error("the broker's records know no such client, or not with these leases")]
    Leases = 5,
    /// Its capacity is memory of a NUMA node ([`Admit::Itself`](super::Admit::Itself)).
    #[error("the broker's capacity is memory of a NUMA node: run programs there with numactl")]
    Node = 6,
    /// A code of a later version.
    #[error("the broker gave a reason this version does not know")]
    Unknown = u64::MAX,
}

impl RefusedCode {
    /// The code of `arg0`.
    pub fn from_wire(value: u64) -> Self {
        match value {
            1 => Self::Version,
            2 => Self::User,
            3 => Self::Malformed,
            4 => Self::Full,
            5 => Self::Leases,
            6 => Self::Node,
            _ => Self::Unknown,
        }
    }
}

/// Why a tag can't be mapped; arg0 of [`Kind::SharedRefused`](super::protocol::Kind::SharedRefused).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
#[repr(u64)]
pub enum SharedCode {
    /// Nothing that is accepted has this tag.
    #[error("no capacity here has this tag")]
    NoTag = 1,
    /// The tag's capacity belongs to this host alone.
    #[error("the capacity of this tag is not shared: make an arena with the tag")]
    NotShared = 2,
    /// It is on its way back.
    #[error("the capacity of this tag has been asked back")]
    AskedBack = 3,
    /// Some of its extents start or end within a granule.
    #[error("the extents of this tag are not whole granules of 2 MiB")]
    Misaligned = 4,
    /// No descriptors or memory left.
    #[error("the broker has no room for another mapping")]
    Full = 5,
    /// A code of a later version.
    #[error("the broker gave a reason this version does not know")]
    Unknown = u64::MAX,
}

impl SharedCode {
    /// The code of `arg0`.
    pub fn from_wire(value: u64) -> Self {
        match value {
            1 => Self::NoTag,
            2 => Self::NotShared,
            3 => Self::AskedBack,
            4 => Self::Misaligned,
            5 => Self::Full,
            _ => Self::Unknown,
        }
    }
}

/// Why capacity stayed where it was; arg1 of [`Kind::RecallRefused`](super::protocol::Kind::RecallRefused) and a receipt's `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
#[repr(u64)]
pub enum RefusalReason {
    /// Live data is in it, and the client has no way to move it.
    #[error("live data is in it")]
    Live = 1,
    /// The program pinned it.
    #[error("pinned by the program")]
    Pinned = 2,
    /// Moving it to DRAM would exceed the client's limit.
    #[error("the client's DRAM limit is reached")]
    DramLimit = 3,
    /// The program changed the mapping (mprotect, mlock, protection key).
    #[error("the program changed its mapping")]
    Remapped = 4,
    /// The client could not move it now (a fork under way, no userfaultfd).
    #[error("the client could not move it")]
    CannotMove = 5,
    /// The client did not answer by the deadline.
    #[error("the client did not answer by the deadline")]
    Deadline = 6,
    /// The client's socket is closed, but a process still maps its memory.
    #[error("its client closed the connection and still maps it")]
    Unreachable = 7,
    /// The range is no accepted capacity of this broker.
    #[error("not accepted capacity")]
    NotAccepted = 8,
    /// Capacity of one tag goes back whole, and part of it is in use.
    #[error("capacity of its tag goes back whole, and part of that is in use")]
    TagInUse = 9,
    /// Shares a device block with capacity in use.
    #[error("shares a device block with capacity in use")]
    BlockInUse = 10,
    /// The device refused or failed the release command.
    #[error("the device did not take it")]
    Device = 11,
    /// The device took it while it was in use (forced release).
    #[error("the device took it while it was in use")]
    Lost = 12,
    /// Moving it to DRAM would exceed the client's limit, and spilling it its other one.
    #[error("the client's DRAM limit and its spill_limit are reached")]
    SpillFull = 13,
    /// The client could not write the file that it spills to.
    #[error("the client's DRAM limit is reached, and its spill file can't be written")]
    SpillFailed = 14,
    /// The client has nearly as many mappings as a process may.
    #[error("the client has nearly as many mappings as it may (vm.max_map_count)")]
    Mappings = 15,
    /// A program has it mapped read-only.
    #[error("shared capacity that a program has mapped")]
    SharedMapped = 0x20,
    /// Nobody named it.
    #[error("shared with other hosts: it goes back only by its range")]
    Shared = 0x21,
    /// A client answered with a reason this version does not know.
    #[error("for a reason this version does not know")]
    Unknown = u64::MAX,
}

impl RefusalReason {
    /// The reason of `arg1`; 0 (none given) reads as [`RefusalReason::Live`].
    pub fn from_wire(value: u64) -> Self {
        match value {
            0 | 1 => Self::Live,
            2 => Self::Pinned,
            3 => Self::DramLimit,
            4 => Self::Remapped,
            5 => Self::CannotMove,
            6 => Self::Deadline,
            7 => Self::Unreachable,
            8 => Self::NotAccepted,
            9 => Self::TagInUse,
            10 => Self::BlockInUse,
            11 => Self::Device,
            12 => Self::Lost,
            13 => Self::SpillFull,
            14 => Self::SpillFailed,
            15 => Self::Mappings,
            0x20 => Self::SharedMapped,
            0x21 => Self::Shared,
            _ => Self::Unknown,
        }
    }
}
