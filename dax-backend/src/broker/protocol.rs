//! What travels between broker and clients: one message type of fixed size.
//!
//! The socket is `SOCK_SEQPACKET`, so that a message arrives whole or not at
//! all and neither end needs a buffer that grows. Offsets are bytes into the
//! *window* (DPA minus the lowest Dynamic Capacity base of the device) and
//! multiples of [`GRANULE`]. `magic`, `version` and `kind` keep their place in
//! every version, so that two versions can at least refuse each other by name.
#![forbid(unsafe_code)]

use std::fmt;

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::extent::ExtentTag;

pub use super::ranges::Ranges;
pub use super::reason::{RefusalReason, RefusedCode, SharedCode};

/// Bytes of one granule, the unit of leases: 2 MiB.
pub const GRANULE: u64 = 2 << 20;
/// First four bytes of every message: `DCM1`, read as little-endian.
pub const MAGIC: u32 = u32::from_le_bytes(*b"DCM1");
/// Version of this protocol; both ends must agree.
pub const VERSION: u16 = 3;
/// Ranges that fit into one message.
pub const MAX_RANGES: usize = 28;
/// Runs of shared granules that fit into one message: two ranges each.
pub const MAX_RUNS: usize = MAX_RANGES / 2;

/// [`Kind::Welcome`]: a third descriptor, `/dev/userfaultfd`, came along.
pub const WELCOME_USERFAULTFD: u32 = 1 << 0;
/// [`Kind::Grant`]: nothing more can be granted now; [`Kind::CapacityAvailable`] follows when it can.
pub const GRANT_EXHAUSTED: u32 = 1 << 0;
/// [`Kind::Grant`]: last message of the answer to one [`Kind::Lease`].
pub const GRANT_LAST: u32 = 1 << 1;
/// [`Kind::Shared`]: last message of the answer.
pub const SHARED_LAST: u32 = 1 << 0;
/// [`Kind::Held`]: the list ends here.
pub const HELD_LAST: u32 = 1 << 0;
/// [`Kind::Recall`]: the device has already taken the memory; there is nothing left to copy.
/// Not answered; the client returns the ranges once nothing of it maps them, and until then
/// nobody gets them, even if the device lends them anew.
pub const RECALL_LOST: u32 = 1 << 0;
/// [`Kind::Recall`]: at the deadline the client answers and goes on.
pub const RECALL_PAST_DEADLINE: u32 = 1 << 1;
/// [`Kind::ForkShare`], [`Kind::ForkEvict`]: the list ends here.
pub const FORK_LAST: u32 = 1 << 0;

/// [`Kind::Recall`]: just what the client does not use, or what its program drops; nothing
/// live is moved, and nothing refused. The broker keeps it, for others.
pub const RECALL_UNUSED: u32 = 1 << 2;

/// What a message says. Broker to client has the top bit of the low byte set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// arg0 role ([`Role`]), arg1/arg2 run id (high, low half; 0 if none), or what the role says.
    Hello = 0x01,
    /// arg0 bytes wanted, arg1/arg2 tag (high, low half; 0: untagged). Answered by one or more
    /// grants, the last with [`GRANT_LAST`].
    Lease = 0x02,
    /// ranges: given back; the client does not map them any more.
    Return = 0x03,
    /// id of the recall; numbers as in
    /// [`RecallOutcome`](super::outcome::RecallOutcome). What is returned travels
    /// in [`Kind::Return`] before it, what is refused in [`Kind::RecallRefused`].
    RecallAnswer = 0x04,
    /// One descriptor: a memfd with a JSON request. Admin role only.
    AdminRequest = 0x05,
    /// id of the recall; arg0 bytes refused, arg1 reason ([`RefusalReason`]);
    /// ranges (optional): where. One for each reason.
    RecallRefused = 0x06,
    /// ranges: what a client that rejoins still has; the last message of the
    /// list, which may be empty, with [`HELD_LAST`].
    Held = 0x07,
    /// Two descriptors: a new userfaultfd of the client, and a *line*, a socket
    /// over which it speaks around forks, with the kinds below. That is
    /// answered (or closed: forks are not served). arg0: the address of a page,
    /// which shows to each descendant the two words of its [`Kind::ForkJoin`].
    ForkSetUp = 0x08,
    /// A fork is near: until its end nothing is [`Kind::ForkFilled`]. Answered.
    ForkBegin = 0x09,
    /// ranges: runs, see [`Message::shared_runs`]. They are covered by
    /// placeholders, and leases no more. The last message of the list, which
    /// may be empty, has [`FORK_LAST`] and is answered. Then from server to
    /// broker, with ranges of the window; each is answered.
    ForkShare = 0x0A,
    /// The child is made, or is not.
    ForkEnd = 0x0B,
    /// Server to broker; ranges: nobody needs these any more.
    ForkFree = 0x0C,
    /// Server to broker; id, arg0 bytes: a [`Kind::ForkEvict`] is done.
    ForkEvicted = 0x0D,
    /// Server to broker: the family is no more. To a descendant: it has copies
    /// of all that it inherited.
    ForkEnded = 0x0E,
    /// On a line; runs that were shared, which the client wants back as leases
    /// of its own; without any: it asks what it could have, from address arg0
    /// on. Answered: not 0 if somebody else needs them still. Then from
    /// server to broker, with ranges of the window; answered, too.
    ForkTake = 0x0F,
    /// On a line, after [`Kind::ForkTake`]: the client has them in place.
    ForkTaken = 0x10,
    /// arg0, arg1: what names a descendant of a client that forked. One
    /// descriptor: a line on which it hears [`Kind::ForkFilled`], and at last
    /// [`Kind::ForkEnded`]. Handed on to the server.
    ForkJoin = 0x11,
    /// arg1/arg2 tag: its shared capacity is to be mapped read-only. [`Role::Reader`] only;
    /// answered by [`Kind::Shared`] or [`Kind::SharedRefused`].
    OpenShared = 0x20,
    /// arg0 window length, arg1 granule, arg2 client id, arg3 offset of the
    /// window in its file; ranges\[0\]: the DPA range it shows. Descriptors:
    /// window, client page, and `/dev/userfaultfd` if [`WELCOME_USERFAULTFD`].
    Welcome = 0x81,
    /// arg0 [`RefusedCode`], arg1 the broker's protocol version.
    Refused = 0x82,
    /// arg0 bytes in this message, arg1/arg2 their tag, ranges: leased from now on, reading as
    /// zero.
    Grant = 0x83,
    /// id; arg0 bytes asked back, arg1 deadline in ms; ranges (optional): just these.
    Recall = 0x84,
    /// Asking for a lease is worth while again.
    CapacityAvailable = 0x85,
    /// The host is short of DRAM: what lies there for want of extents should
    /// move to extents, and what is only kept should go.
    DramShort = 0x86,
    /// id of the question; arg0 0 ok, 1 refused. On a line, and from broker to
    /// server.
    ForkAnswer = 0x89,
    /// runs: the client has copies of these, in DRAM, and they are registered
    /// with its userfaultfd no more. On a line.
    ForkFilled = 0x8A,
    /// Broker to server; id; ranges: everybody is to have copies of these. The
    /// last message of the list has [`FORK_LAST`].
    ForkEvict = 0x8B,
    /// Broker to server; ranges: the device has taken these by force.
    ForkLost = 0x8C,
    /// arg0 0 ok, 1 error. One descriptor: a memfd with the JSON reply.
    AdminReply = 0x87,
    /// Before an [`Kind::AdminReply`] that takes time: arg0 bytes asked for,
    /// arg1 bytes returned until now.
    AdminProgress = 0x88,
    /// arg0 bytes of the tag in all, arg3 offset of the window in its file; ranges: its extents
    /// in the order of their sequence numbers; the last message has [`SHARED_LAST`]. Descriptors,
    /// with the first one: window, and a page that is mapped for as long as they are.
    Shared = 0xa0,
    /// arg0 [`SharedCode`].
    SharedRefused = 0xa1,
}

impl Kind {
    fn from_wire(value: u16) -> Option<Self> {
        Some(match value {
            0x01 => Self::Hello,
            0x02 => Self::Lease,
            0x03 => Self::Return,
            0x04 => Self::RecallAnswer,
            0x05 => Self::AdminRequest,
            0x06 => Self::RecallRefused,
            0x07 => Self::Held,
            0x08 => Self::ForkSetUp,
            0x09 => Self::ForkBegin,
            0x0A => Self::ForkShare,
            0x0B => Self::ForkEnd,
            0x0C => Self::ForkFree,
            0x0D => Self::ForkEvicted,
            0x0E => Self::ForkEnded,
            0x0F => Self::ForkTake,
            0x10 => Self::ForkTaken,
            0x11 => Self::ForkJoin,
            0x89 => Self::ForkAnswer,
            0x8A => Self::ForkFilled,
            0x8B => Self::ForkEvict,
            0x8C => Self::ForkLost,
            0x20 => Self::OpenShared,
            0x81 => Self::Welcome,
            0x82 => Self::Refused,
            0x83 => Self::Grant,
            0x84 => Self::Recall,
            0x85 => Self::CapacityAvailable,
            0x86 => Self::DramShort,
            0x87 => Self::AdminReply,
            0x88 => Self::AdminProgress,
            0xa0 => Self::Shared,
            0xa1 => Self::SharedRefused,
            _ => return None,
        })
    }
}

/// What a connection is for; arg0 of [`Kind::Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Role {
    /// A process that takes leases.
    Client = 0,
    /// `dcm`: status, add, release.
    Admin = 1,
    /// A client that lost its connection: id is its number, arg1/arg2 the key
    /// in its page. Answered by a welcome without anything in it, or refused;
    /// then [`Kind::Held`] follows, and is answered likewise.
    Rejoin = 2,
    /// A process that maps shared capacity. Answered by a welcome without anything in it; then
    /// [`Kind::OpenShared`] follows.
    Reader = 0x20,
}

/// Bytes of the window: offset and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WindowRange {
    /// First byte, counted from the window's start.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl WindowRange {
    /// First byte after the range; saturating, since a peer may send anything.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// Neighbouring granules of a client's heap that show neighbouring granules of
/// the window. All in bytes, multiples of [`GRANULE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SharedRun {
    /// Address in the client.
    pub addr: u64,
    /// Offset into the window.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl SharedRun {
    /// The part of the window that it shows.
    pub fn window(&self) -> WindowRange {
        WindowRange {
            offset: self.offset,
            len: self.len,
        }
    }

    /// First byte of the window after it; saturating.
    pub fn end(&self) -> u64 {
        self.window().end()
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireRange {
    offset: U64,
    len: U64,
}

/// One message, 512 bytes, little-endian.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Message {
    magic: U32,
    version: U16,
    kind: U16,
    id: U64,
    arg: [U64; 4],
    count: U32,
    flags: U32,
    ranges: [WireRange; MAX_RANGES],
    reserved: U64,
}

const _: () = assert!(size_of::<Message>() == 512);

/// Bytes of a [`Message`].
pub const MESSAGE_SIZE: usize = size_of::<Message>();

/// Why received bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// Not 512 bytes.
    #[error("a message has {MESSAGE_SIZE} bytes, this has {0}")]
    Length(usize),
    /// The magic is missing: the peer is something else.
    #[error("not a dcmalloc message (magic {0:#010x})")]
    Magic(u32),
    /// Another protocol version.
    #[error("protocol version {theirs}, this side speaks {VERSION}: use matching releases")]
    Version {
        /// What the peer sent.
        theirs: u16,
    },
    /// A kind this version does not know.
    #[error("unknown message kind {0:#06x}")]
    Kind(u16),
    /// More ranges than a message holds.
    #[error("{0} ranges in one message, at most {MAX_RANGES} fit")]
    Count(u32),
}

impl Message {
    /// An otherwise empty message of `kind`.
    pub fn new(kind: Kind) -> Self {
        let mut message = Self::new_zeroed();
        message.magic = MAGIC.into();
        message.version = VERSION.into();
        message.kind = (kind as u16).into();
        message
    }

    /// Sets the number that ties an answer to its question.
    pub fn with_id(mut self, id: u64) -> Self {
        self.id = id.into();
        self
    }

    /// Sets argument `index` (0-3).
    pub fn with_arg(mut self, index: usize, value: u64) -> Self {
        self.arg[index] = value.into();
        self
    }

    /// Sets the tag: arguments 1 and 2.
    pub fn with_tag(self, tag: ExtentTag) -> Self {
        let number = u128::from_be_bytes(tag.0);
        self.with_arg(1, (number >> 64) as u64)
            .with_arg(2, number as u64)
    }

    /// The tag in arguments 1 and 2.
    pub fn tag(&self) -> ExtentTag {
        let number = u128::from(self.arg(1)) << 64 | u128::from(self.arg(2));
        ExtentTag(number.to_be_bytes())
    }

    /// Sets the flags; their meaning depends on the kind.
    pub fn with_flags(mut self, flags: u32) -> Self {
        self.flags = flags.into();
        self
    }

    /// Sets the ranges; those beyond [`MAX_RANGES`] are left out, so callers chunk.
    pub fn with_ranges(mut self, ranges: &[WindowRange]) -> Self {
        debug_assert!(ranges.len() <= MAX_RANGES);
        for (wire, range) in self.ranges.iter_mut().zip(ranges) {
            wire.offset = range.offset.into();
            wire.len = range.len.into();
        }
        self.count = (ranges.len().min(MAX_RANGES) as u32).into();
        self
    }

    /// Writes plain numbers where ranges would be; at most twice [`MAX_RANGES`].
    pub(super) fn with_numbers(mut self, numbers: &[u64]) -> Self {
        debug_assert!(numbers.len() <= 2 * MAX_RANGES);
        let mut numbers = numbers.iter().copied();
        for wire in &mut self.ranges {
            wire.offset = numbers.next().unwrap_or(0).into();
            wire.len = numbers.next().unwrap_or(0).into();
        }
        self
    }

    /// What [`Self::with_numbers`] wrote, with zeroes to the end.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u64> {
        let pairs = self.ranges.iter();
        pairs.flat_map(|wire| [wire.offset.get(), wire.len.get()])
    }

    /// Sets the runs, each as two ranges; those beyond [`MAX_RUNS`] are left out.
    pub fn with_runs(self, runs: &[SharedRun]) -> Self {
        debug_assert!(runs.len() <= MAX_RUNS);
        let mut ranges = [WindowRange::default(); MAX_RANGES];
        let count = runs.len().min(MAX_RUNS) * 2;
        for (pair, run) in ranges.chunks_exact_mut(2).zip(runs) {
            pair[0] = WindowRange {
                offset: run.addr,
                len: run.len,
            };
            pair[1] = run.window();
        }
        self.with_ranges(&ranges[..count])
    }

    /// The runs: of each two ranges the first is addresses of the client, the
    /// second as long a part of the window.
    pub fn shared_runs(&self) -> impl ExactSizeIterator<Item = SharedRun> + Clone + use<> {
        let ranges = self.ranges();
        (0..ranges.as_slice().len() / 2).map(move |i| {
            let pair = &ranges.as_slice()[2 * i..2 * i + 2];
            SharedRun {
                addr: pair[0].offset,
                offset: pair[1].offset,
                len: pair[0].len.min(pair[1].len),
            }
        })
    }

    /// Checks `bytes` and reads them.
    ///
    /// [`Kind::Hello`] and [`Kind::Refused`] are read whatever their version is,
    /// because they are how two versions tell each other.
    pub fn parse(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let message =
            Self::read_from_bytes(bytes).map_err(|_| ProtocolError::Length(bytes.len()))?;
        if message.magic.get() != MAGIC {
            return Err(ProtocolError::Magic(message.magic.get()));
        }
        let kind = Kind::from_wire(message.kind.get());
        if message.version.get() != VERSION && !matches!(kind, Some(Kind::Hello | Kind::Refused)) {
            return Err(ProtocolError::Version {
                theirs: message.version.get(),
            });
        }
        if kind.is_none() {
            return Err(ProtocolError::Kind(message.kind.get()));
        }
        if message.count.get() as usize > MAX_RANGES {
            return Err(ProtocolError::Count(message.count.get()));
        }
        Ok(message)
    }

    /// The message as it travels.
    pub fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }

    /// What the message says.
    pub fn kind(&self) -> Option<Kind> {
        Kind::from_wire(self.kind.get())
    }

    /// Protocol version of the sender.
    pub fn version(&self) -> u16 {
        self.version.get()
    }

    /// The number that ties an answer to its question.
    pub fn id(&self) -> u64 {
        self.id.get()
    }

    /// Argument `index` (0-3).
    pub fn arg(&self, index: usize) -> u64 {
        self.arg[index].get()
    }

    /// The flags.
    pub fn flags(&self) -> u32 {
        self.flags.get()
    }

    /// The ranges, copied out.
    pub fn ranges(&self) -> Ranges {
        let mut ranges = Ranges::default();
        let count = (self.count.get() as usize).min(MAX_RANGES);
        for wire in &self.ranges[..count] {
            ranges.push(WindowRange {
                offset: wire.offset.get(),
                len: wire.len.get(),
            });
        }
        ranges
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("kind", &self.kind())
            .field("id", &self.id())
            .field("arg", &self.arg.map(U64::get))
            .field("flags", &self.flags())
            .field("ranges", &self.ranges().as_slice())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_round_trips_every_field() {
        let ranges: Vec<_> = (0..MAX_RANGES as u64)
            .map(|i| WindowRange {
                offset: i * GRANULE,
                len: GRANULE,
            })
            .collect();
        let sent = Message::new(Kind::Grant)
            .with_id(7)
            .with_arg(0, 1)
            .with_arg(3, u64::MAX)
            .with_flags(GRANT_LAST)
            .with_ranges(&ranges);
        assert_eq!(sent.bytes().len(), 512);
        let read = Message::parse(sent.bytes()).unwrap();
        assert_eq!(read.kind(), Some(Kind::Grant));
        assert_eq!(
            (read.id(), read.arg(0), read.arg(1), read.arg(3)),
            (7, 1, 0, u64::MAX)
        );
        assert_eq!(read.flags(), GRANT_LAST);
        assert_eq!(read.ranges().as_slice(), ranges);
        assert_eq!(read.ranges().bytes(), 28 * GRANULE);
    }

    #[test]
    fn layout_is_what_the_protocol_says() {
        let m = Message::new(Kind::Recall)
            .with_id(0x0102)
            .with_arg(1, 9)
            .with_flags(5)
            .with_ranges(&[WindowRange { offset: 3, len: 4 }]);
        let bytes = m.bytes();
        assert_eq!(&bytes[..8], b"DCM1\x03\x00\x84\x00");
        assert_eq!(bytes[8..10], [2, 1]);
        assert_eq!(bytes[24], 9);
        assert_eq!((bytes[48], bytes[52], bytes[56], bytes[64]), (1, 5, 3, 4));
    }

    #[test]
    fn each_malformed_message_has_its_own_error() {
        let good = Message::new(Kind::Lease);
        let edit = |at: usize, value: u8| {
            let mut bytes = good.bytes().to_vec();
            bytes[at] = value;
            Message::parse(&bytes).err()
        };
        assert_eq!(
            Message::parse(&good.bytes()[..511]).err(),
            Some(ProtocolError::Length(511))
        );
        assert!(matches!(edit(0, 0), Some(ProtocolError::Magic(_))));
        assert_eq!(edit(4, 9), Some(ProtocolError::Version { theirs: 9 }));
        assert_eq!(edit(6, 0x70), Some(ProtocolError::Kind(0x70)));
        assert_eq!(edit(48, 29), Some(ProtocolError::Count(29)));
        assert_eq!(edit(48, 28), None);
    }

    #[test]
    fn hello_and_refused_are_read_in_any_version() {
        for kind in [Kind::Hello, Kind::Refused] {
            let mut bytes = Message::new(kind).bytes().to_vec();
            bytes[4] = 77;
            assert_eq!(Message::parse(&bytes).unwrap().version(), 77);
        }
    }

    proptest::proptest! {
        /// Whatever 512 bytes come, reading them is an error or a message that
        /// can be asked for anything.
        #[test]
        fn no_bytes_are_too_strange(
            mut bytes in proptest::collection::vec(proptest::num::u8::ANY, MESSAGE_SIZE),
            valid_head in proptest::bool::ANY,
        ) {
            if valid_head {
                bytes[..8].copy_from_slice(&Message::new(Kind::Return).bytes()[..8]);
                bytes[48..52].copy_from_slice(&28u32.to_le_bytes());
            }
            if let Ok(message) = Message::parse(&bytes) {
                proptest::prop_assert!(message.kind().is_some());
                let ranges = message.ranges();
                proptest::prop_assert!(ranges.as_slice().len() <= MAX_RANGES);
                proptest::prop_assert!(ranges.as_slice().iter().all(|r| r.end() >= r.offset));
                let _ = ranges.bytes();
            } else {
                proptest::prop_assert!(!valid_head);
            }
        }
    }
}
