//! What a source does while its broker is away: it tries to take up again with
//! the one that comes next, on the thread that would hear the broker.

use core::ffi::CStr;
use core::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use core::time::Duration;
use std::os::fd::{AsRawFd, RawFd};

use allocator::Tag;
use allocator::source::{Event, Ranges};
use allocator::sync::{Guard, Lock};
use dax_backend::broker::client::ConnectError;
use dax_backend::broker::{BrokerClient, ClientPageMapping, WindowRange};
use rustix::io::Errno;

use crate::leases::Leases;

/// More than a unix socket's address holds.
const PATH: usize = 128;
/// The first pause between two attempts, and the longest.
const SOON: Duration = Duration::from_millis(10);
const SELDOM: Duration = Duration::from_secs(5);

/// States of a connection.
const HERE: u8 = 0;
const AWAY: u8 = 1;
const BACK: u8 = 2;

/// What it takes to find back.
pub(crate) struct Rejoin {
    path: [u8; PATH],
    /// The broker's number for this client.
    client: u64,
    pub(crate) leases: Leases,
    /// What the broker that comes next was told of.
    listed: Leases,
    /// What was given back, and no broker heard of it.
    unheard: Leases,
    /// Held while something is given back, and while a new socket takes the
    /// place of an old one: each is heard of by one broker, once.
    socket: Lock<()>,
    /// Held while originals become leases again, and from the list for a new
    /// broker to its answer: it books what the list says, and what is taken
    /// before or after that, but not what comes between.
    takes: Lock<()>,
    state: AtomicU8,
    attempts: AtomicU32,
}

impl Rejoin {
    /// `window_len` is the window's (bytes).
    ///
    /// # Errors
    /// No address space.
    pub(crate) fn new(path: &CStr, client: u64, window_len: u64) -> Result<Self, Errno> {
        let mut copy = [0; PATH];
        let bytes = path.to_bytes_with_nul();
        if let Some(space) = copy.get_mut(..bytes.len()) {
            space.copy_from_slice(bytes);
        }
        Ok(Self {
            path: copy,
            client,
            leases: Leases::new(window_len)?,
            listed: Leases::new(window_len)?,
            unheard: Leases::new(window_len)?,
            socket: Lock::new(()),
            takes: Lock::new(()),
            state: AtomicU8::new(HERE),
            attempts: AtomicU32::new(0),
        })
    }

    /// Where the broker listens.
    pub(crate) fn path(&self) -> Option<&CStr> {
        CStr::from_bytes_until_nul(&self.path).ok()
    }

    /// Whether the broker can be heard.
    pub(crate) fn is_here(&self) -> bool {
        self.state.load(Ordering::Acquire) == HERE
    }

    /// The connection broke.
    pub(crate) fn lost(&self) -> Event {
        self.attempts.store(0, Ordering::Relaxed);
        self.state.store(AWAY, Ordering::Release);
        Event::Disconnected
    }

    /// The next event of a connection that is not there: after a pause, an
    /// attempt. A new socket takes the place of `old`, whoever sends to it.
    pub(crate) fn next_event(
        &self,
        old: RawFd,
        page: &ClientPageMapping,
        patience: Duration,
    ) -> Event {
        if self.state.load(Ordering::Acquire) == BACK {
            self.state.store(HERE, Ordering::Release);
            return Event::CapacityAvailable;
        }
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let pause = (SOON * (1 << attempt.min(16))).min(SELDOM);
        std::thread::sleep(pause.min(patience));
        let Some(path) = self.path() else {
            return Event::Closed;
        };
        match self.find_broker(path, page) {
            Ok(new) => {
                if !self.replace(old, &new) {
                    return Event::Timeout;
                }
                self.state.store(BACK, Ordering::Release);
                // Whatever was asked of the old broker is not answered any more.
                Event::Granted {
                    ranges: Ranges::EMPTY,
                    tag: Tag::NONE,
                    exhausted: false,
                    last: true,
                }
            }
            // It knows us not, and never will.
            Err(ConnectError::Refused { .. }) => Event::Closed,
            Err(_) => Event::Timeout,
        }
    }

    /// Takes up with the broker that is there now.
    fn find_broker(
        &self,
        path: &CStr,
        page: &ClientPageMapping,
    ) -> Result<BrokerClient, ConnectError> {
        let _held = self.hold_takes();
        self.listed.clear();
        // What is given back before it is listed is not listed.
        self.unheard.clear();
        let held = self.leases.runs().inspect(|range| self.listed.add(*range));
        BrokerClient::rejoin(path, self.client, page, held)
    }

    /// Puts a new socket in the place of `old`, whoever sends to it, and says
    /// what was given back since it was listed. `false`: it could not.
    fn replace(&self, old: RawFd, new: &BrokerClient) -> bool {
        let _held = self.socket.lock();
        // SAFETY: both are open in the descriptor table that belongs to the
        // allocator's threads alone.
        if unsafe { libc::dup3(new.fd().as_raw_fd(), old, libc::O_CLOEXEC) } < 0 {
            return false;
        }
        self.unheard.keep(&self.listed);
        for range in self.unheard.runs() {
            // A broker that is gone again is told of what is left.
            let _ = new.return_ranges(&[range]);
        }
        true
    }

    /// Gives leases back over `client`, which has the socket. `false`: nobody
    /// was there to hear of it, and whoever comes next will.
    pub(crate) fn give_back(&self, client: &BrokerClient, ranges: &[WindowRange]) -> bool {
        let _held = self.socket.lock();
        // First: a broker that comes next is told of the leases that are left.
        for range in ranges {
            self.leases.remove(*range);
        }
        let heard = client.return_ranges(ranges).is_ok();
        if !heard {
            ranges.iter().for_each(|range| self.unheard.add(*range));
        }
        heard
    }

    /// Keeps a new broker from being told of the leases meanwhile. The fork
    /// server, which is asked for originals, needs no rejoin to be answered.
    pub(crate) fn hold_takes(&self) -> Guard<'_, ()> {
        self.takes.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::os::fd::OwnedFd;
    use std::os::unix::ffi::OsStrExt;

    use dax_backend::broker::GRANULE;
    use dax_backend::broker::protocol::{HELD_LAST, Kind, MESSAGE_SIZE, Message};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind,
        listen, recv, send, socket_with,
    };

    const PATIENCE: Duration = Duration::from_secs(5);

    fn granules(first: u64, count: u64) -> WindowRange {
        WindowRange {
            offset: first * GRANULE,
            len: count * GRANULE,
        }
    }

    fn listener(path: &CStr) -> OwnedFd {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
        bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
        listen(&socket, 4).unwrap();
        socket
    }

    fn next(socket: &OwnedFd) -> Message {
        let mut bytes = [0u8; MESSAGE_SIZE];
        let (len, _) = recv(socket, &mut bytes[..], RecvFlags::empty()).unwrap();
        assert_eq!(len, MESSAGE_SIZE);
        Message::parse(&bytes).unwrap()
    }

    fn welcome(socket: &OwnedFd) {
        let message = Message::new(Kind::Welcome);
        send(socket, message.bytes(), SendFlags::empty()).unwrap();
    }

    /// What a client that rejoins lists; it waits for the answer.
    fn listed(listener: &OwnedFd) -> (OwnedFd, Vec<WindowRange>) {
        let socket = accept(listener).unwrap();
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).unwrap();
        assert_eq!(next(&socket).kind(), Some(Kind::Hello));
        welcome(&socket);
        let held = next(&socket);
        assert_eq!((held.kind(), held.flags()), (Some(Kind::Held), HELD_LAST));
        (socket, held.ranges().as_slice().to_vec())
    }

    #[test]
    fn what_is_given_back_during_a_rejoin_is_heard_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = CString::new(dir.path().join("broker").as_os_str().as_bytes()).unwrap();
        let broker = listener(&path);
        let page = memfd_create("page", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&page, 4096).unwrap();
        let page = ClientPageMapping::map(&page).unwrap();
        let rejoin = Rejoin::new(&path, 1, 64 * GRANULE).unwrap();
        let client = std::thread::scope(|scope| {
            scope.spawn(|| welcome(&listed(&broker).0));
            BrokerClient::rejoin(&path, 1, &page, std::iter::empty()).unwrap()
        });
        rejoin.leases.add(granules(0, 8));
        rejoin.leases.add(granules(20, 4));
        rejoin.lost();
        assert!(!rejoin.give_back(&client, &[granules(0, 1)]));

        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (socket, ranges) = listed(&broker);
                assert_eq!(ranges, [granules(1, 7), granules(20, 4)]);
                let returned = [granules(2, 1), granules(21, 2)];
                assert!(!rejoin.give_back(&client, &returned));
                welcome(&socket);
                for range in returned {
                    let message = next(&socket);
                    assert_eq!(message.kind(), Some(Kind::Return));
                    assert_eq!(message.ranges().as_slice(), [range]);
                }
                // And once.
                assert!(rejoin.give_back(&client, &[granules(5, 1)]));
                assert_eq!(next(&socket).ranges().as_slice(), [granules(5, 1)]);
            });
            let event = rejoin.next_event(client.fd().as_raw_fd(), &page, PATIENCE);
            assert!(matches!(event, Event::Granted { .. }));
        });
    }
}
