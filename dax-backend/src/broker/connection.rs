//! One accepted socket and what waits to be sent over it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::SendFlags;

use super::lease::ClientId;
use super::peer::Peer;
use super::protocol::Message;
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

/// One accepted socket. The broker never waits for a peer: what a socket does
/// not take at once is queued.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    pub(super) peer: Peer,
    pub(super) phase: Phase,
    outbox: VecDeque<Message>,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd, now: Instant) -> Result<Self, Errno> {
        let peer = Peer::of(&socket)?;
        Ok(Self {
            socket,
            peer,
            phase: Phase::New { since: now },
            outbox: VecDeque::new(),
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
        self.outbox.push_back(message);
        self.flush()
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
