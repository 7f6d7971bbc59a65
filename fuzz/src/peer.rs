//! One end of a connection to a broker that may say anything.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use arbitrary::Arbitrary;
use dax_backend::broker::protocol::{MESSAGE_SIZE, Message};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
    socketpair,
};

/// Descriptors that go along with a message.
#[derive(Arbitrary, Debug)]
pub enum Attached {
    Nothing,
    Memfd,
    /// A memfd with these bytes.
    Text(Vec<u8>),
    Event,
    /// What a client that forks sends: a userfaultfd, and a socket (whose other end is closed).
    Line,
    /// The same with something else than a userfaultfd.
    Sockets,
}

impl Attached {
    fn make(&self) -> Vec<OwnedFd> {
        let memfd = || memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
        let event = || eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
        let socket = || {
            let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
            let pair = socketpair(AddressFamily::UNIX, kind, flags, None);
            pair.expect("sockets").0
        };
        match self {
            Self::Nothing => Vec::new(),
            Self::Memfd => vec![memfd()],
            Self::Text(text) => {
                let fd = memfd();
                rustix::io::write(&fd, text).expect("room");
                vec![fd]
            }
            Self::Event => vec![event()],
            Self::Line => {
                // Not everybody may have one.
                vec![any_userfaultfd().unwrap_or_else(event), socket()]
            }
            Self::Sockets => vec![socket(), socket()],
        }
    }
}

#[expect(
    unsafe_code,
    reason = "it is what could be used to change this process's memory"
)]
fn any_userfaultfd() -> Option<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: no range of this process is ever registered with it.
    unsafe { userfaultfd(flags) }.ok()
}

/// What there is to hear.
pub enum Heard {
    Nothing,
    Message(Box<Message>),
    Closed,
}

/// A connection.
pub struct Peer(OwnedFd);

impl Peer {
    /// Connects to the broker at `path`.
    pub fn connect(path: &Path) -> Self {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let socket = socket_with(AddressFamily::UNIX, kind, flags, None).expect("a socket");
        let address = SocketAddrUnix::new(path).expect("a short path");
        connect(&socket, &address).expect("the broker listens");
        Self(socket)
    }

    /// Sends `bytes`, if the broker still listens.
    pub fn send(&self, bytes: &[u8], attached: &Attached) {
        let fds = attached.make();
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&fds));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let _ = sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, flags);
    }

    /// What has come, without waiting. Descriptors that came along are closed.
    pub fn hear(&self) -> Heard {
        let mut bytes = [0; MESSAGE_SIZE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.0, &mut into, &mut control, flags);
        control.drain().for_each(drop);
        match received {
            Err(Errno::AGAIN) => Heard::Nothing,
            Ok(message) if message.bytes > 0 => {
                let message = Message::parse(&bytes).expect("the broker keeps to its protocol");
                Heard::Message(Box::new(message))
            }
            _ => Heard::Closed,
        }
    }
}
