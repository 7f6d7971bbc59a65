//! One end of a socket, and the messages that it has no room for yet.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::broker::protocol::Message;
use crate::broker::socket::{SocketError, send_message};

/// Sends in order, and never waits.
#[derive(Debug)]
pub(super) struct Outbox {
    socket: OwnedFd,
    queue: VecDeque<(Message, Option<OwnedFd>)>,
}

impl Outbox {
    pub(super) fn new(socket: OwnedFd) -> Self {
        let queue = VecDeque::new();
        Self { socket, queue }
    }

    /// Sends `message`, now or as soon as there is room.
    ///
    /// # Errors
    /// The other end is gone.
    pub(super) fn send(&mut self, message: Message) -> Result<(), SocketError> {
        self.send_with(message, None)
    }

    /// The same with a descriptor.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub(super) fn send_with(
        &mut self,
        message: Message,
        fd: Option<OwnedFd>,
    ) -> Result<(), SocketError> {
        self.queue.push_back((message, fd));
        self.flush()
    }

    /// Sends what there is room for.
    ///
    /// # Errors
    /// The other end is gone.
    pub(super) fn flush(&mut self) -> Result<(), SocketError> {
        while let Some((message, fd)) = self.queue.front() {
            let fds = fd.as_ref().map(AsFd::as_fd);
            match send_message(self.as_fd(), message, fds.as_slice(), SendFlags::DONTWAIT) {
                Ok(()) => drop(self.queue.pop_front()),
                Err(SocketError::System(Errno::AGAIN)) => return Ok(()),
                Err(error) => {
                    self.queue.clear();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Descriptors that wait for room.
    pub(super) fn descriptors(&self) -> usize {
        self.queue.iter().filter(|(_, fd)| fd.is_some()).count()
    }

    /// Whether it waits for room.
    pub(super) fn is_blocked(&self) -> bool {
        !self.queue.is_empty()
    }
}

impl AsFd for Outbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
