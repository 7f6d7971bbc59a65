//! One accepted socket and what waits to be sent over it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, shutdown};

use super::lease::ClientId;
use super::peer::Peer;
use super::protocol::{MAX_RANGES, Message};
use super::sharing::ReaderId;
use super::socket::{Descriptors, SocketError, receive_message, send_message};

/// The broker's number for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ConnectionId(pub(super) u64);

/// What a connection has turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// No hello yet.
    New {
        /// When it connected.
        since: Instant,
    },
    /// A process with leases.
    Client(ClientId),
    /// A process that says which leases it has.
    Rejoining(ClientId),
    /// A process that is going to say which shared tag it maps.
    Reading,
    /// A process that maps a shared tag.
    Reader(ReaderId),
    /// The operator.
    Admin,
}

/// Messages that wait for a peer, besides those that may name each granule.
const PATIENCE: usize = 1024;

/// One accepted socket. The broker never waits for a peer: what a socket does
/// not take at once is queued. A peer that never reads is cut off, which, unlike
/// not reading what it says, can't have both wait for each other.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    pub(super) peer: Peer,
    pub(super) phase: Phase,
    outbox: VecDeque<Message>,
    /// The longest outbox.
    limit: usize,
}

impl Connection {
    /// `granules`: those of the window.
    pub(super) fn new(socket: OwnedFd, granules: usize, now: Instant) -> Result<Self, Errno> {
        let peer = Peer::of(&socket)?;
        Ok(Self {
            socket,
            peer,
            phase: Phase::New { since: now },
            outbox: VecDeque::new(),
            // A grant, a recall and a loss of everything, in runs of one granule.
            limit: PATIENCE + 3 * granules.div_ceil(MAX_RANGES),
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether messages wait for the peer to read.
    pub(super) fn is_blocked(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Sends `message`, now or when the peer has read enough.
    pub(super) fn send(&mut self, message: Message) -> Result<(), SocketError> {
        if self.outbox.len() >= self.limit {
            self.cut_off();
            return Err(SocketError::Closed);
        }
        self.outbox.push_back(message);
        self.flush()
    }

    /// Ends the conversation; whoever reads the socket hears of it.
    fn cut_off(&mut self) {
        tracing::warn!(pid = self.peer.pid, "a peer that does not read is cut off");
        self.outbox.clear();
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Sends `message` with descriptors, now or never: only used where a peer
    /// that waits for it has nothing else to read.
    pub(super) fn send_fds(
        &mut self,
        message: &Message,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SocketError> {
        send_message(self.socket.as_fd(), message, fds, SendFlags::DONTWAIT)
    }

    /// Sends what is queued, as far as the socket takes it.
    pub(super) fn flush(&mut self) -> Result<(), SocketError> {
        while let Some(message) = self.outbox.front() {
            match send_message(self.socket.as_fd(), message, &[], SendFlags::DONTWAIT) {
                Ok(()) => {
                    self.outbox.pop_front();
                }
                Err(SocketError::System(Errno::AGAIN)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The next message, if there is one.
    pub(super) fn receive(&self, fds: &mut Descriptors) -> Result<Option<Message>, SocketError> {
        match receive_message(self.socket.as_fd(), fds) {
            Ok(message) => Ok(Some(message)),
            Err(SocketError::System(Errno::AGAIN)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
