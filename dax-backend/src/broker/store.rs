//! Descriptors that outlive the broker's process.
//!
//! Whatever must survive is in a memfd or a socket, and somebody else holds a
//! duplicate of it: the keeper that `dcm serve` is, which starts the broker
//! anew when it dies and hands everything back. The messages are systemd's
//! (sd_notify(3), `FDSTORE=1`, `FDSTOREREMOVE=1`, `FDNAME=`), so that the keeper
//! can have systemd hold them in turn.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Longest message, in bytes; a descriptor's name has at most 255.
const MESSAGE: usize = 512;

/// What one message says.
#[derive(Debug)]
pub enum Notice {
    /// Hold this.
    Keep(String, OwnedFd),
    /// Let go of it.
    Forget(String),
    /// The broker serves; or the keeper has handed over everything.
    Ready,
    /// Something else.
    Other,
}

/// One end of the connection between keeper and broker.
#[derive(Debug)]
pub struct StoreSocket(OwnedFd);

impl StoreSocket {
    /// Both ends.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn pair() -> Result<(Self, Self), Errno> {
        let flags = SocketFlags::CLOEXEC;
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok((Self(a), Self(b)))
    }

    /// An end that was inherited.
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// The descriptor, to be inherited.
    pub fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Has the other end hold a duplicate of `fd` as `name`.
    ///
    /// # Errors
    /// The other end is gone.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), &[fd])
    }

    /// Has the other end let go of `name`.
    ///
    /// # Errors
    /// The other end is gone.
    pub fn forget(&self, name: &str) -> Result<(), Errno> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), &[])
    }

    /// Broker to keeper: it serves. Keeper to broker: everything is handed over.
    ///
    /// # Errors
    /// The other end is gone.
    pub fn ready(&self) -> Result<(), Errno> {
        self.send("READY=1", &[])
    }

    fn send(&self, text: &str, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::INVAL);
        }
        let iov = [IoSlice::new(text.as_bytes())];
        loop {
            match sendmsg(&self.0, &iov, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    /// The next message; waits for it. `None`: the other end is gone.
    ///
    /// # Errors
    /// The system's.
    pub fn receive(&self) -> Result<Option<Notice>, Errno> {
        let mut bytes = [0u8; MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received.bytes,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(errno) => return Err(errno),
            }
        };
        let mut fd = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(mut rights) = message {
                fd = rights.next();
            }
        }
        if received == 0 {
            return Ok(None);
        }
        let text = String::from_utf8_lossy(&bytes[..received]).into_owned();
        Ok(Some(read(&text, fd)))
    }
}

impl AsFd for StoreSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn read(text: &str, fd: Option<OwnedFd>) -> Notice {
    let field = |key: &str| text.lines().find_map(|line| line.strip_prefix(key));
    let name = field("FDNAME=").map(str::to_owned);
    match (name, fd) {
        (Some(name), Some(fd)) if field("FDSTORE=") == Some("1") => Notice::Keep(name, fd),
        (Some(name), _) if field("FDSTOREREMOVE=") == Some("1") => Notice::Forget(name),
        _ if field("READY=") == Some("1") => Notice::Ready,
        _ => Notice::Other,
    }
}

/// The broker's view: what was handed back, and whom to hand more.
#[derive(Debug, Default)]
pub struct Store {
    keeper: Option<StoreSocket>,
    kept: BTreeMap<String, OwnedFd>,
}

impl Store {
    /// Of a broker that nobody starts anew: nothing is kept.
    pub fn none() -> Self {
        Self::default()
    }

    /// Receives what `keeper` has kept.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn receive(keeper: StoreSocket) -> Result<Self, Errno> {
        let mut kept = BTreeMap::new();
        loop {
            match keeper.receive()? {
                Some(Notice::Keep(name, fd)) => drop(kept.insert(name, fd)),
                Some(Notice::Ready) => break,
                Some(_) => {}
                None => return Err(Errno::PIPE),
            }
        }
        Ok(Self {
            keeper: Some(keeper),
            kept,
        })
    }

    /// What was kept as `name`, once.
    pub fn take(&mut self, name: &str) -> Option<OwnedFd> {
        self.kept.remove(name)
    }

    /// All that was kept under names that begin with `prefix`, with the rest of
    /// the name.
    pub fn take_all(&mut self, prefix: &str) -> Vec<(String, OwnedFd)> {
        let names = self.kept.keys();
        let names: Vec<String> = names.filter(|n| n.starts_with(prefix)).cloned().collect();
        let take = |name: String| {
            let fd = self.kept.remove(&name)?;
            Some((name[prefix.len()..].to_owned(), fd))
        };
        names.into_iter().filter_map(take).collect()
    }

    /// The connection to the keeper.
    pub fn keeper(&self) -> Option<&StoreSocket> {
        self.keeper.as_ref()
    }

    /// Has the keeper hold a duplicate of `fd` as `name`. A keeper that is gone
    /// holds nothing, and the broker does without.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) {
        if let Some(keeper) = &self.keeper {
            let _ = keeper.keep(name, fd);
        }
    }

    /// Has the keeper let go of `name`.
    pub fn forget(&self, name: &str) {
        if let Some(keeper) = &self.keeper {
            let _ = keeper.forget(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::io::{pread, pwrite};

    #[test]
    fn what_is_kept_comes_back_by_name() {
        let (keeper, broker) = StoreSocket::pair().unwrap();
        let file = memfd_create("kept", MemfdFlags::CLOEXEC).unwrap();
        pwrite(&file, b"here", 0).unwrap();
        broker.keep("page-17", file.as_fd()).unwrap();
        broker.forget("page-3").unwrap();
        broker.ready().unwrap();
        drop((broker, file));
        let Some(Notice::Keep(name, fd)) = keeper.receive().unwrap() else {
            panic!("nothing to keep");
        };
        assert!(matches!(keeper.receive(), Ok(Some(Notice::Forget(gone))) if gone == "page-3"));
        assert!(matches!(keeper.receive(), Ok(Some(Notice::Ready))));
        assert!(matches!(keeper.receive(), Ok(None)));

        let (keeper, broker) = StoreSocket::pair().unwrap();
        keeper.keep(&name, fd.as_fd()).unwrap();
        keeper.ready().unwrap();
        let mut store = Store::receive(broker).unwrap();
        let fd = store.take("page-17").unwrap();
        let mut bytes = [0; 4];
        pread(&fd, &mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"here");
        assert!(store.take("page-17").is_none());
    }

    #[test]
    fn a_name_without_a_descriptor_is_nothing_to_keep() {
        assert!(matches!(read("FDSTORE=1\nFDNAME=x", None), Notice::Other));
        assert!(matches!(read("WATCHDOG=1", None), Notice::Other));
    }
}
