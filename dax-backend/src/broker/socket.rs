//! Messages and descriptors over a seqpacket socket (unix(7)), without allocating.
#![forbid(unsafe_code)]

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;

use super::protocol::{MESSAGE_SIZE, Message, ProtocolError};

/// Why nothing can be sent or received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The other end closed it.
    #[error("closed by the other end")]
    Closed,
    /// A system call failed.
    #[error("{0}")]
    System(Errno),
    /// What came was no message.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
}

impl From<Errno> for SocketError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::PIPE | Errno::CONNRESET => Self::Closed,
            other => Self::System(other),
        }
    }
}

/// Waits until there is something to receive; `false` when `timeout` passed first.
pub(crate) fn readable(
    socket: BorrowedFd<'_>,
    timeout: Option<Duration>,
) -> Result<bool, SocketError> {
    let timeout = timeout.map(|limit| Timespec {
        tv_sec: limit.as_secs().min(i32::MAX as u64) as i64,
        tv_nsec: i64::from(limit.subsec_nanos()),
    });
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::IN)];
    loop {
        match poll(&mut fds, timeout.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Descriptors that came with a message; at most three, the rest is closed.
#[derive(Default)]
pub(crate) struct Descriptors(pub(crate) [Option<OwnedFd>; 3]);

/// Sends `message`; never raises SIGPIPE.
pub(crate) fn send_message(
    socket: BorrowedFd<'_>,
    message: &Message,
    fds: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<(), SocketError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL.into());
    }
    let iov = [IoSlice::new(message.bytes())];
    loop {
        match sendmsg(socket, &iov, &mut control, flags | SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Receives what is there, without waiting (`EAGAIN`: nothing).
pub(crate) fn receive_message(
    socket: BorrowedFd<'_>,
    fds: &mut Descriptors,
) -> Result<Message, SocketError> {
    receive_with(socket, fds, RecvFlags::empty())
}

/// As [`receive_message`], and the message can be received again.
pub(crate) fn peek_message(socket: BorrowedFd<'_>) -> Result<Message, SocketError> {
    receive_with(socket, &mut Descriptors::default(), RecvFlags::PEEK)
}

fn receive_with(
    socket: BorrowedFd<'_>,
    fds: &mut Descriptors,
    how: RecvFlags,
) -> Result<Message, SocketError> {
    // One byte more than a message, so that a longer one shows.
    let mut bytes = [0u8; MESSAGE_SIZE + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT | how;
    let received = loop {
        let mut iov = [IoSliceMut::new(&mut bytes)];
        match recvmsg(socket, &mut iov, &mut control, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            for (slot, fd) in fds.0.iter_mut().zip(rights) {
                *slot = Some(fd);
            }
        }
    }
    if received.bytes == 0 {
        return Err(SocketError::Closed);
    }
    Ok(Message::parse(&bytes[..received.bytes])?)
}
