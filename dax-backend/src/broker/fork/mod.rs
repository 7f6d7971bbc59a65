//! Forks served by the broker (`fork:lazy`).
//!
//! Before a client forks it covers its extents with placeholders registered
//! with a userfaultfd, and tells the broker what was where. The broker holds
//! that descriptor, is handed those of all descendants at birth, and gives
//! each a copy of what it touches. Meanwhile the *originals* are leased to the
//! family, and don't change:
//!
//! ```text
//!  leased to the client ──share──► leased to its family ──nobody needs it──► free
//!           ▲                              │
//!           └──────only the client needs it┘
//! ```
//! `family` keeps the books, `thread` serves, `uffd` is the system calls. This
//! file is the broker's side: who holds which lease.

mod family;
mod thread;
mod uffd;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::lease::ClientId;
use super::protocol::{Kind, MAX_RUNS, Message, SharedRun, WindowRange};
use super::server::Broker;
use super::socket::Descriptors;
use thread::{Desk, News, Order, Server};
use uffd::Uffd;

/// All families.
#[derive(Debug)]
pub(super) struct Forks {
    families: BTreeMap<ClientId, Handle>,
    news: Receiver<(ClientId, News)>,
    sender: Sender<(ClientId, News)>,
    /// Made with the first family.
    bell: Option<Arc<OwnedFd>>,
}

#[derive(Debug)]
struct Handle {
    orders: Sender<Order>,
    bell: Arc<OwnedFd>,
}

impl Handle {
    fn order(&self, order: Order) {
        // A family that has ended says so.
        let _ = self.orders.send(order);
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

fn bell() -> Result<Arc<OwnedFd>, Errno> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(Arc::new)
}

impl Default for Forks {
    fn default() -> Self {
        let (sender, news) = channel();
        Self {
            families: BTreeMap::new(),
            news,
            sender,
            bell: None,
        }
    }
}

impl Forks {
    /// Whether no process depends on this broker for what it inherited.
    pub(super) fn is_empty(&self) -> bool {
        self.families.is_empty()
    }

    /// Readable when there is news.
    pub(super) fn bell(&self) -> Option<BorrowedFd<'_>> {
        self.bell.as_deref().map(AsFd::as_fd)
    }

    fn desk(&mut self, client: ClientId) -> Result<Desk, Errno> {
        let bell = match &self.bell {
            Some(bell) => bell.clone(),
            None => self.bell.insert(bell()?).clone(),
        };
        Ok(Desk {
            client,
            news: self.sender.clone(),
            bell,
        })
    }
}

impl ClientId {
    /// The holder of the originals of this client's family.
    fn family(self) -> Self {
        Self(self.0 | FAMILY)
    }

    /// Whether this is no client, but a family.
    pub(super) fn is_family(self) -> bool {
        self.0 & FAMILY != 0
    }
}

/// The bit that makes a client's number its family's. Clients would have to
/// come for years, a thousand a second, to reach it.
const FAMILY: u32 = 1 << 31;

impl Broker {
    /// A client wants its forks served: its userfaultfd, and a socket to talk
    /// over. Where that can't be, the socket is closed.
    pub(super) fn fork_set_up(&mut self, client: ClientId, fds: Descriptors) {
        let [Some(uffd), Some(line), ..] = fds.0 else {
            self.counters.malformed += 1;
            return;
        };
        if self.forks.families.contains_key(&client) {
            return;
        }
        let desk = self.forks.desk(client);
        let (Ok(root), Ok(bell), Ok(desk)) = (Uffd::set_up(uffd), bell(), desk) else {
            return;
        };
        let (orders, incoming) = channel();
        let mapping = self.window.mapping().clone();
        let server = Server::new(desk, mapping, line, root, incoming, bell.clone());
        let spawned = std::thread::Builder::new()
            .name("dcm-fork".into())
            .spawn(move || server.run());
        if spawned.is_ok() {
            self.forks.families.insert(client, Handle { orders, bell });
        }
    }

    /// Does what families have news of.
    pub(super) fn hear_families(&mut self, now: Instant) {
        if let Some(bell) = self.forks.bell() {
            let _ = rustix::io::read(bell, &mut [0u8; 8]);
        }
        while let Ok((client, news)) = self.forks.news.try_recv() {
            match news {
                News::Share(ranges) => {
                    let ours = self.table.hand_over(client, client.family(), &ranges);
                    if ours {
                        self.counters.forked_bytes += bytes(&ranges);
                        self.now_leased(client, 0, bytes(&ranges));
                    }
                    self.order(client, Order::Shared(ours));
                }
                News::Restore(runs) => self.restore(client, runs),
                News::Filled(runs) => self.post_runs(client, Kind::ForkFilled, &runs),
                News::Free(ranges) => self.originals_free(client, &ranges),
                News::Evicted { id, bytes } => {
                    let answer = Message::new(Kind::RecallAnswer)
                        .with_id(id)
                        .with_arg(1, bytes);
                    self.recall_answered(client.family(), &answer, now);
                }
                News::Ended => {
                    self.forks.families.remove(&client);
                    self.table.end(client.family());
                    self.claim_for_recall();
                    self.hand_over_returned();
                    self.recall_unanswerable(client.family(), now);
                }
            }
        }
    }

    /// Leases that only the client needs are its own again, if it can be told.
    fn restore(&mut self, client: ClientId, runs: Vec<SharedRun>) {
        let reachable = self
            .clients
            .get(&client)
            .is_some_and(|c| c.connection.is_some());
        let ranges: Vec<WindowRange> = runs.iter().map(SharedRun::window).collect();
        if reachable && self.table.hand_over(client.family(), client, &ranges) {
            self.now_leased(client, bytes(&ranges), 0);
            self.post_runs(client, Kind::ForkRestored, &runs);
        } else {
            self.order(client, Order::PutBack(runs));
        }
    }

    fn now_leased(&mut self, client: ClientId, more: u64, less: u64) {
        if let Some(client) = self.clients.get_mut(&client) {
            client.leased = (client.leased + more).saturating_sub(less);
        }
    }

    fn originals_free(&mut self, client: ClientId, ranges: &[WindowRange]) {
        for range in ranges {
            match self.table.give_back(client.family(), *range) {
                Ok(returned) => self.counters.returned_bytes += returned,
                Err(_) => self.counters.malformed += 1,
            }
        }
        self.claim_for_recall();
        self.hand_over_returned();
    }

    fn post_runs(&mut self, client: ClientId, kind: Kind, runs: &[SharedRun]) {
        let connection = self.clients.get(&client).and_then(|c| c.connection);
        for chunk in runs.chunks(MAX_RUNS) {
            self.post(connection, Message::new(kind).with_runs(chunk));
        }
    }

    fn order(&self, client: ClientId, order: Order) {
        if let Some(family) = self.forks.families.get(&client) {
            family.order(order);
        }
    }

    /// Has a family copy its originals in `ranges`; recall `id` is answered
    /// when that is done.
    pub(super) fn evict(&self, family: ClientId, id: u64, ranges: Vec<WindowRange>) {
        let client = ClientId(family.0 & !FAMILY);
        self.order(client, Order::Evict { id, ranges });
    }

    /// Families that hold originals, and what of it, at most `bytes` each.
    pub(super) fn originals(&self, bytes: u64) -> Vec<(ClientId, Vec<WindowRange>)> {
        let families = self.forks.families.keys().map(|client| client.family());
        families
            .map(|family| (family, self.table.leased_by(family, bytes)))
            .filter(|(_, ranges)| !ranges.is_empty())
            .collect()
    }
}

fn bytes(ranges: &[WindowRange]) -> u64 {
    ranges.iter().map(|range| range.len).sum()
}
