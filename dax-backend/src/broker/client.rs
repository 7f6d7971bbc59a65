//! A process's connection to the broker.
//!
//! It runs inside `malloc`, possibly before `main` and on a thread with a small
//! stack: no heap allocation, no formatting, no buffered I/O, and no wait
//! without a limit. Errors are plain `Copy` values; rendering them is up to
//! whoever may allocate.
#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    socketpair,
};
use thiserror::Error;

use super::client_page::ClientPageMapping;
pub use super::fork_client::{FamilyLine, ForkLine, Heard, SharedRuns};
use super::outcome::RecallOutcome;
use super::peer::Peer;
use super::protocol::{
    GRANT_EXHAUSTED, GRANT_LAST, GRANULE, HELD_LAST, Kind, MAX_RANGES, Message, RECALL_LOST,
    RECALL_PAST_DEADLINE, RECALL_UNUSED, Ranges, RefusalReason, RefusedCode, Role,
    WELCOME_USERFAULTFD, WindowRange,
};
use super::socket::{Descriptors, SocketError, readable, receive_message, send_message};
use crate::extent::ExtentTag;

/// How long a broker may take to welcome a client, and to make room for a
/// message: it may be waiting for its device, which has 2 s for a command
/// (CXL r3.1 8.2.8.4, mailbox command time-out).
const PATIENCE: Duration = Duration::from_secs(4);

/// Why there is no connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The path is longer than a unix socket address holds (107 bytes).
    #[error("the socket's path is too long for a unix socket")]
    Path,
    /// No socket there, or nobody listens.
    #[error("no broker is reachable there: {0}")]
    Unreachable(Errno),
    /// The socket belongs to somebody whose memory must not become this process's heap.
    #[error("the broker runs as user {uid}, not as root or as this user: not trusted")]
    Untrusted {
        /// The broker's user.
        uid: u32,
    },
    /// The broker turned us away.
    #[error("{code} (protocol version {broker_version} there)")]
    Refused {
        /// Why.
        code: RefusedCode,
        /// The broker's protocol version.
        broker_version: u16,
    },
    /// Connected, but the broker did not answer in four seconds.
    #[error("the broker does not answer")]
    Silent,
    /// The welcome lacks descriptors or has impossible values.
    #[error("the broker's welcome is unusable")]
    Welcome,
    /// The client page could not be mapped.
    #[error("mapping the client page failed: {0}")]
    Page(Errno),
    /// The conversation broke.
    #[error(transparent)]
    Conversation(#[from] ClientError),
}

/// Why a conversation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The socket broke. Leases stay valid for as long as the client page is mapped.
    #[error("the connection to the broker broke: {0}")]
    Socket(#[from] SocketError),
    /// A message that has no place here.
    #[error("the broker sent a message that has no place here")]
    Unexpected,
}

impl From<Errno> for ClientError {
    fn from(errno: Errno) -> Self {
        Self::Socket(errno.into())
    }
}

/// What the broker hands a new client.
pub struct Welcome {
    /// The file that shows the device's memory: a memfd, or `/dev/daxX.Y`.
    pub window: OwnedFd,
    /// Where the window starts in that file.
    pub window_base: u64,
    /// Bytes of the window, leased or not.
    pub window_len: u64,
    /// The DPA range that the window shows (`offset` is the first DPA).
    pub dpa: WindowRange,
    /// Unit of leases in bytes; always [`GRANULE`] in this version.
    pub granule: u64,
    /// The broker's number for this client.
    pub client_id: u64,
    /// The page that proves this process alive and carries its statistics.
    pub page: ClientPageMapping,
    /// An open `/dev/userfaultfd`, where the broker could open it for us.
    pub userfaultfd: Option<OwnedFd>,
}

/// A message from the broker, after the welcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FromBroker {
    /// Answer, or part of it, to a lease request.
    Grant {
        /// Leased from now on, reading as zero.
        ranges: Ranges,
        /// Their tag; null: none.
        tag: ExtentTag,
        /// No more capacity now.
        exhausted: bool,
        /// Nothing more follows for this request.
        last: bool,
    },
    /// Leases asked back.
    Recall {
        /// To be repeated in the answer.
        id: u64,
        /// Bytes asked for.
        bytes: u64,
        /// When the broker stops waiting, from receipt.
        deadline: Duration,
        /// If not empty: only these ranges help.
        ranges: Ranges,
        /// The device has taken the memory already (forced release).
        lost: bool,
        /// At the deadline the client answers and goes on.
        past_deadline: bool,
        /// Just what is not used, or what the program drops; nothing is refused.
        unused: bool,
    },
    /// Asking for a lease is worth while again.
    CapacityAvailable,
    /// The host is short of DRAM.
    DramShort,
}

/// The connection. Sending is atomic per message, so threads may share it;
/// receiving is for one thread.
#[derive(Debug)]
pub struct BrokerClient {
    socket: OwnedFd,
}

impl BrokerClient {
    /// Connects to the broker at `path`, shakes hands and maps the client page.
    /// `run_id` names the `dcm run` that this process belongs to (0: none).
    pub fn connect(path: &CStr, run_id: u128) -> Result<(Self, Welcome), ConnectError> {
        let client = Self::open(path)?;
        client.send(&hello(Role::Client, run_id), &[])?;
        let mut fds = Descriptors::default();
        let message = client.answer(&mut fds)?;
        let [window, page, userfaultfd] = fds.0;
        let (Some(window), Some(page)) = (window, page) else {
            return Err(ConnectError::Welcome);
        };
        let dpa = message.ranges();
        let &[dpa] = dpa.as_slice() else {
            return Err(ConnectError::Welcome);
        };
        let welcome = Welcome {
            window,
            window_base: message.arg(3),
            window_len: message.arg(0),
            dpa,
            granule: message.arg(1),
            client_id: message.arg(2),
            page: ClientPageMapping::map(&page).map_err(ConnectError::Page)?,
            userfaultfd: userfaultfd.filter(|_| message.flags() & WELCOME_USERFAULTFD != 0),
        };
        if welcome.granule != GRANULE || welcome.window_len == 0 {
            return Err(ConnectError::Welcome);
        }
        Ok((client, welcome))
    }

    /// Takes up again with the broker at `path`, as client `client` with the
    /// page that its welcome brought and `held` of the window. On success the
    /// broker knows of exactly these leases.
    pub fn rejoin(
        path: &CStr,
        client: u64,
        page: &ClientPageMapping,
        held: impl Iterator<Item = WindowRange>,
    ) -> Result<Self, ConnectError> {
        let connection = Self::open(path)?;
        connection.send(&hello(Role::Rejoin, page.key()).with_id(client), &[])?;
        connection.answer(&mut Descriptors::default())?;
        let mut list = Ranges::default();
        for range in held {
            if !list.push(range) {
                let message = Message::new(Kind::Held).with_ranges(list.as_slice());
                connection.send(&message, &[])?;
                list = Ranges::default();
                list.push(range);
            }
        }
        let last = Message::new(Kind::Held)
            .with_ranges(list.as_slice())
            .with_flags(HELD_LAST);
        connection.send(&last, &[])?;
        connection.answer(&mut Descriptors::default())?;
        Ok(connection)
    }

    /// Connects in the admin role: requests and replies travel as memfds.
    pub(crate) fn connect_admin(path: &CStr) -> Result<Self, ConnectError> {
        let client = Self::open(path)?;
        client.send(&hello(Role::Admin, 0), &[])?;
        client.answer(&mut Descriptors::default())?;
        Ok(client)
    }

    /// Connects as one that maps shared capacity.
    pub(super) fn connect_reader(path: &CStr, run_id: u128) -> Result<Self, ConnectError> {
        let client = Self::open(path)?;
        client.send(&hello(Role::Reader, run_id), &[])?;
        client.answer(&mut Descriptors::default())?;
        Ok(client)
    }

    /// The next message, which must come in four seconds.
    pub(super) fn patiently(&self, fds: &mut Descriptors) -> Result<Message, ConnectError> {
        self.receive(Some(PATIENCE), fds)?
            .ok_or(ConnectError::Silent)
    }

    /// Over a socket whose other end the broker has been handed.
    pub(super) fn over(socket: OwnedFd) -> Self {
        Self { socket }
    }

    fn open(path: &CStr) -> Result<Self, ConnectError> {
        let address = SocketAddrUnix::new(path).map_err(|_| ConnectError::Path)?;
        let socket = socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(ClientError::from)?;
        // Also bounds connect(2), which waits while the broker's backlog is full.
        set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE)).map_err(ClientError::from)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) | Err(Errno::ISCONN) => break,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(ConnectError::Silent),
                Err(errno) => return Err(ConnectError::Unreachable(errno)),
            }
        }
        let broker = Peer::of(&socket).map_err(ClientError::from)?;
        let own = rustix::process::geteuid().as_raw();
        if broker.uid != 0 && broker.uid != own {
            return Err(ConnectError::Untrusted { uid: broker.uid });
        }
        Ok(Self { socket })
    }

    /// The answer to a hello: a welcome, or the reason for none.
    fn answer(&self, fds: &mut Descriptors) -> Result<Message, ConnectError> {
        let message = self.patiently(fds)?;
        match message.kind() {
            Some(Kind::Welcome) => Ok(message),
            Some(Kind::Refused) => Err(ConnectError::Refused {
                code: RefusedCode::from_wire(message.arg(0)),
                broker_version: message.version(),
            }),
            _ => Err(ConnectError::Welcome),
        }
    }

    /// The socket, for poll(2).
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Asks for `bytes` of capacity with no tag; grants follow through [`Self::recv`].
    pub fn request_lease(&self, bytes: u64) -> Result<(), ClientError> {
        self.request_tagged_lease(bytes, ExtentTag::NULL)
    }

    /// Asks for `bytes` of the capacity with this tag.
    pub fn request_tagged_lease(&self, bytes: u64, tag: ExtentTag) -> Result<(), ClientError> {
        let message = Message::new(Kind::Lease).with_arg(0, bytes).with_tag(tag);
        self.send(&message, &[])
    }

    /// Gives `ranges` back, in as many messages as they need. The caller has
    /// unmapped them everywhere: the broker wipes them at once.
    pub fn return_ranges(&self, ranges: &[WindowRange]) -> Result<(), ClientError> {
        for chunk in ranges.chunks(MAX_RANGES) {
            self.send(&Message::new(Kind::Return).with_ranges(chunk), &[])?;
        }
        Ok(())
    }

    /// Says of recall `id` that `bytes` are not returned and why. `ranges` may
    /// name them; those beyond [`MAX_RANGES`] go unnamed.
    pub fn refuse_recall(
        &self,
        id: u64,
        reason: RefusalReason,
        bytes: u64,
        ranges: &[WindowRange],
    ) -> Result<(), ClientError> {
        let named = &ranges[..ranges.len().min(MAX_RANGES)];
        let message = Message::new(Kind::RecallRefused)
            .with_id(id)
            .with_arg(0, bytes)
            .with_arg(1, reason as u64)
            .with_ranges(named);
        self.send(&message, &[])
    }

    /// Says what came of recall `id`, after what it returned and refused.
    pub fn answer_recall(&self, id: u64, outcome: &RecallOutcome) -> Result<(), ClientError> {
        let message = Message::new(Kind::RecallAnswer).with_id(id);
        self.send(&outcome.write(message), &[])
    }

    /// Hears of what this process inherited from an ancestor that forked, which
    /// shows it `name`.
    pub fn join_family(&self, name: [u64; 2]) -> Result<FamilyLine, ClientError> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let message = Message::new(Kind::ForkJoin)
            .with_arg(0, name[0])
            .with_arg(1, name[1]);
        self.send(&message, &[theirs.as_fd()])?;
        Ok(FamilyLine::new(Self::over(ours)))
    }

    /// Has the broker serve this process's forks, with `userfaultfd`: a new
    /// one, on which no `UFFDIO_API` was done. `mark`: see [`Kind::ForkSetUp`].
    pub fn serve_forks(
        &self,
        userfaultfd: BorrowedFd<'_>,
        mark: u64,
    ) -> Result<ForkLine, ClientError> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let message = Message::new(Kind::ForkSetUp).with_arg(0, mark);
        self.send(&message, &[userfaultfd, theirs.as_fd()])?;
        drop(theirs);
        ForkLine::open(Self::over(ours))
    }

    /// The next message; `None` when none came within `timeout` (`None`: no limit).
    pub fn recv(&self, timeout: Option<Duration>) -> Result<Option<FromBroker>, ClientError> {
        let Some(message) = self.receive(timeout, &mut Descriptors::default())? else {
            return Ok(None);
        };
        let flags = message.flags();
        Ok(Some(match message.kind() {
            Some(Kind::Grant) => FromBroker::Grant {
                ranges: message.ranges(),
                tag: message.tag(),
                exhausted: flags & GRANT_EXHAUSTED != 0,
                last: flags & GRANT_LAST != 0,
            },
            Some(Kind::Recall) => FromBroker::Recall {
                id: message.id(),
                bytes: message.arg(0),
                deadline: Duration::from_millis(message.arg(1)),
                ranges: message.ranges(),
                lost: flags & RECALL_LOST != 0,
                past_deadline: flags & RECALL_PAST_DEADLINE != 0,
                unused: flags & RECALL_UNUSED != 0,
            },
            Some(Kind::CapacityAvailable) => FromBroker::CapacityAvailable,
            Some(Kind::DramShort) => FromBroker::DramShort,
            _ => return Err(ClientError::Unexpected),
        }))
    }

    pub(crate) fn send(
        &self,
        message: &Message,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        Ok(send_message(self.fd(), message, fds, SendFlags::empty())?)
    }

    pub(crate) fn receive(
        &self,
        timeout: Option<Duration>,
        fds: &mut Descriptors,
    ) -> Result<Option<Message>, ClientError> {
        if !readable(self.fd(), timeout)? {
            return Ok(None);
        }
        match receive_message(self.fd(), fds) {
            Ok(message) => Ok(Some(message)),
            Err(SocketError::System(Errno::AGAIN)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// `id` is that of the run, or the key of a client that rejoins.
fn hello(role: Role, id: u128) -> Message {
    Message::new(Kind::Hello)
        .with_arg(0, role as u64)
        .with_arg(1, (id >> 64) as u64)
        .with_arg(2, id as u64)
}
