//! Forks that copy nothing (`fork:lazy`).
//!
//! Before a client forks it covers its extents with placeholders registered
//! with a userfaultfd, and tells what was where. A *fork server* holds that
//! descriptor, is handed those of all descendants at birth, and gives each a
//! copy of what it touches. Meanwhile the *originals* are leased to the
//! *family*, and don't change:
//!
//! ```text
//!  leased to the client ──share──► leased to its family ──nobody needs it──► free
//! ```
//! A userfaultfd whose last descriptor closes makes zeroes of what was not
//! touched, so each family has a fork server of its own, which outlives brokers
//! that die: `dcm` makes it a process. It and the broker talk over a *desk*, a
//! socket of which the keeper holds the broker's end; a message there is taken
//! off when what it asks is done, and doing it twice does no harm.
//!
//! `family` keeps the books, `server` serves, `line` is what the client says,
//! `uffd` is the system calls. This
//! file is the broker's side: who holds which lease.

mod family;
mod guard;
mod line;
mod member;
mod outbox;
mod server;
#[cfg(test)]
mod tests;
mod uffd;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::lease::ClientId;
use super::outcome::RecallOutcome;
use super::protocol::{FORK_LAST, Kind, MAX_RANGES, Message, WindowRange};
use super::server::Broker;
use super::socket::{Descriptors, SocketError, peek_message, receive_message};
use super::store::{Store, StoreSocket};
pub use guard::guard;
use outbox::Outbox;
use server::Server;
use uffd::Uffd;

/// What a fork server is given.
#[derive(Debug)]
pub struct ForkFamily {
    /// The client's userfaultfd.
    userfaultfd: OwnedFd,
    /// To the client.
    line: OwnedFd,
    /// To the broker.
    desk: OwnedFd,
    /// The window's file.
    window: OwnedFd,
    /// Where the window starts in it.
    pub base: u64,
    /// Bytes of the window.
    pub len: u64,
    /// The client's number.
    pub client: u32,
    /// The address of its page for descendants.
    pub mark: u64,
}

/// Starts a fork server that goes on when the broker dies.
pub type ServeFamily = fn(ForkFamily) -> io::Result<()>;

impl ForkFamily {
    /// Serves until nobody needs an original any more.
    ///
    /// # Errors
    /// The window can't be mapped.
    pub fn serve(self) -> io::Result<()> {
        Server::new(self)?.run();
        Ok(())
    }

    /// Serves on a thread, for brokers that nobody starts anew.
    ///
    /// # Errors
    /// No thread left.
    pub fn serve_on_thread(self) -> io::Result<()> {
        let server = Server::new(self)?;
        let thread = thread::Builder::new().name("dcm-fork".into());
        thread.spawn(move || server.run()).map(drop)
    }

    /// Hands it to another process.
    ///
    /// # Errors
    /// That process is gone.
    pub fn send(&self, socket: &StoreSocket) -> io::Result<()> {
        for (name, fd) in NAMES.into_iter().zip(self.descriptors()) {
            socket.keep(name, fd.as_fd())?;
        }
        Ok(socket.ready()?)
    }

    /// Takes over what [`Self::send`] has sent.
    ///
    /// # Errors
    /// Not all of it came.
    pub fn receive(
        socket: StoreSocket,
        (base, len): (u64, u64),
        (client, mark): (u32, u64),
    ) -> io::Result<Self> {
        let mut store = Store::receive(socket)?;
        let mut take = |name| store.take(name).ok_or(io::ErrorKind::UnexpectedEof);
        let [userfaultfd, line, desk, window] = NAMES;
        Ok(Self {
            userfaultfd: take(userfaultfd)?,
            line: take(line)?,
            desk: take(desk)?,
            window: take(window)?,
            base,
            len,
            client,
            mark,
        })
    }

    fn descriptors(&self) -> [&OwnedFd; 4] {
        [&self.userfaultfd, &self.line, &self.desk, &self.window]
    }
}

const NAMES: [&str; 4] = ["userfaultfd", "line", "desk", "window"];
/// Messages of one family before the others get their turn.
const BURST: usize = 32;
/// Descendants that wait for a fork server to hear of them, each with a
/// descriptor here.
const JOINS: usize = 256;
/// What the keeper calls the broker's end of a desk, before the client's number.
const DESK: &str = "desk-";

/// The broker's ends of all desks.
#[derive(Debug, Default)]
pub(super) struct Forks {
    desks: BTreeMap<ClientId, Outbox>,
}

impl Forks {
    /// Whether no family needs originals.
    pub(super) fn is_empty(&self) -> bool {
        self.desks.is_empty()
    }

    /// Whether this client has a family, which may outlive it.
    pub(super) fn has_family(&self, client: ClientId) -> bool {
        self.desks.contains_key(&client)
    }

    /// What to wait for.
    pub(super) fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.desks.values().map(|desk| {
            let interest = match desk.is_blocked() {
                true => PollFlags::IN | PollFlags::OUT,
                false => PollFlags::IN,
            };
            PollFd::from_borrowed_fd(desk.as_fd(), interest)
        })
    }
}

impl ClientId {
    /// The holder of the originals of this client's family.
    pub(super) fn family(self) -> Self {
        Self(self.0 | FAMILY)
    }

    /// The client whose family this is.
    fn root(self) -> Self {
        Self(self.0 & !FAMILY)
    }

    /// Whether this is no client, but a family.
    pub(super) fn is_family(self) -> bool {
        self.0 & FAMILY != 0
    }
}

/// The bit that makes a client's number its family's. A thousand clients a
/// second reach it in 25 days: then their numbers begin anew.
const FAMILY: u32 = 1 << 31;

impl Broker {
    /// Takes over the families that an earlier broker had.
    pub(super) fn adopt_families(&mut self) {
        for (number, desk) in self.store.take_all(DESK) {
            if let Ok(client) = number.parse() {
                let desk = Outbox::new(desk);
                self.forks.desks.insert(ClientId(client), desk);
            }
        }
        let holders = self.table.holders();
        let desks = &self.forks.desks;
        let served: BTreeSet<ClientId> = desks.keys().map(|client| client.family()).collect();
        for family in holders.into_iter().filter(|holder| holder.is_family()) {
            if !served.contains(&family) && !self.return_originals(family.root()) {
                self.table.end(family);
            }
        }
    }

    /// A client wants its forks served: its userfaultfd, and its line. Where
    /// that can't be, the line is closed.
    pub(super) fn fork_set_up(&mut self, client: ClientId, mark: u64, fds: Descriptors) {
        let [Some(userfaultfd), Some(line), ..] = fds.0 else {
            self.counters.malformed += 1;
            return;
        };
        if self.forks.desks.contains_key(&client) {
            return;
        }
        if let Err(error) = self.start_family(client, userfaultfd, line, mark) {
            tracing::warn!(client = client.0, %error, "forks are not served");
        }
    }

    fn start_family(
        &mut self,
        client: ClientId,
        userfaultfd: OwnedFd,
        line: OwnedFd,
        mark: u64,
    ) -> io::Result<()> {
        Uffd::set_up(userfaultfd.as_fd())?;
        let flags = SocketFlags::CLOEXEC;
        let (ours, desk) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let window = self.window.fd().try_clone_to_owned()?;
        self.store.keep(&desk_name(client), ours.as_fd());
        let served = (self.config.serve_family)(ForkFamily {
            userfaultfd,
            line,
            desk,
            window,
            base: self.window.base(),
            len: self.window.len(),
            client: client.0,
            mark,
        });
        match served {
            Ok(()) => drop(self.forks.desks.insert(client, Outbox::new(ours))),
            Err(_) => self.store.forget(&desk_name(client)),
        }
        served
    }

    /// A descendant wants to hear of what it inherited.
    pub(super) fn fork_join(&mut self, message: &Message, fds: Descriptors) {
        let ancestor = u32::try_from(message.arg(0)).map(ClientId);
        let desk = ancestor.ok().and_then(|id| self.forks.desks.get_mut(&id));
        // Whoever says this too often hears nothing.
        let desk = desk.filter(|desk| desk.descriptors() < JOINS);
        if let (Some(desk), [Some(line), ..]) = (desk, fds.0) {
            let join = Message::new(Kind::ForkJoin).with_arg(0, message.arg(1));
            let _ = desk.send_with(join, Some(line));
        }
    }

    /// Does what families want.
    pub(super) fn hear_families(&mut self, now: Instant) {
        let clients: Vec<ClientId> = self.forks.desks.keys().copied().collect();
        for client in clients {
            for _ in 0..BURST {
                let Some(desk) = self.forks.desks.get_mut(&client) else {
                    break;
                };
                // One that is gone shows when it is read.
                let _ = desk.flush();
                let message = match next_words(desk.as_fd()) {
                    Ok(message) => message,
                    Err(SocketError::System(_)) => break,
                    Err(_) => {
                        self.server_killed(client, now);
                        break;
                    }
                };
                self.family_says(client, &message, now);
                if let Some(desk) = self.forks.desks.get(&client) {
                    let _ = receive_message(desk.as_fd(), &mut Descriptors::default());
                }
            }
        }
    }

    fn family_says(&mut self, client: ClientId, message: &Message, now: Instant) {
        let family = client.family();
        let ranges = message.ranges();
        match message.kind() {
            Some(Kind::ForkShare) => {
                let before = self.table.held(client).0;
                let ours = self.table.hand_over(client, family, ranges.as_slice());
                if ours {
                    // Doing it twice does no harm, and what the device has
                    // taken was no lease any more.
                    let bytes = before - self.table.held(client).0;
                    self.counters.forked_bytes += bytes;
                    if let Some(client) = self.clients.get_mut(&client) {
                        client.leased = client.leased.saturating_sub(bytes);
                    }
                }
                let answer = Message::new(Kind::ForkAnswer)
                    .with_id(message.id())
                    .with_arg(0, u64::from(!ours));
                self.order(client, answer);
                if ours {
                    self.recall_shared(family, ranges.as_slice());
                    // The client was told, and could do nothing any more.
                    let lost = self.table.lost_within(family, ranges.as_slice());
                    self.lose_originals(family, &lost);
                }
            }
            Some(Kind::ForkTake) => {
                let given = self.give_back_originals(client, ranges.as_slice());
                let answer = Message::new(Kind::ForkAnswer)
                    .with_id(message.id())
                    .with_arg(0, u64::from(!given));
                self.order(client, answer);
            }
            Some(Kind::ForkFree) => {
                let returned = self.table.let_go(family, ranges.as_slice());
                self.counters.returned_bytes += returned;
                self.claim_for_recall();
                self.hand_over_returned();
            }
            Some(Kind::ForkEvicted) => {
                let outcome = RecallOutcome {
                    to_dram: message.arg(0),
                    copied: message.arg(0),
                    ..RecallOutcome::default()
                };
                let answer = Message::new(Kind::RecallAnswer).with_id(message.id());
                self.recall_answered(family, &outcome.write(answer), now);
            }
            Some(Kind::ForkEnded) => self.family_ended(client, now),
            _ => self.counters.malformed += 1,
        }
    }

    fn family_ended(&mut self, client: ClientId, now: Instant) {
        let family = client.family();
        self.counters.returned_bytes += self.table.end(family);
        self.forks.desks.remove(&client);
        self.store.forget(&desk_name(client));
        self.claim_for_recall();
        self.hand_over_returned();
        self.recall_unanswerable(family, now);
    }

    /// A fork server is gone without a word.
    fn server_killed(&mut self, client: ClientId, now: Instant) {
        tracing::warn!(client = client.0, "a fork server was killed");
        let lost = self.table.held(client.family()).1;
        if self.return_originals(client) {
            self.tell_lost(client, &lost);
        }
        self.family_ended(client, now);
    }

    /// Makes all originals of a family its client's leases again; whether there
    /// is such a client. Nobody reads them any more, but for what the client was
    /// about to share: it may have heard of no answer, and uses that again.
    /// Which of them that is nobody knows, so all are its until it ends or
    /// rejoins.
    fn return_originals(&mut self, client: ClientId) -> bool {
        let Some(to) = self.clients.get_mut(&client) else {
            return false;
        };
        let family = client.family();
        let mut originals = self.table.leased_by(family, u64::MAX);
        to.leased += originals.iter().map(|range| range.len).sum::<u64>();
        to.leased_peak = to.leased_peak.max(to.leased);
        originals.extend(self.table.held(family).1);
        self.table.hand_over(family, client, &originals)
    }

    /// Makes originals a client's own leases again, unless they are asked back:
    /// their family is at it then.
    fn give_back_originals(&mut self, client: ClientId, ranges: &[WindowRange]) -> bool {
        // A broker that died has done it, and could not say so.
        if self.clients.contains_key(&client) && self.table.is_leased_to(client, ranges) {
            return true;
        }
        let lost = !self.table.held(client.family()).1.is_empty();
        let wanted = self.recalls.active.is_some() || !self.table.marked_within(ranges).is_empty();
        let wanted = wanted || lost;
        let Some(to) = self.clients.get_mut(&client).filter(|_| !wanted) else {
            return false;
        };
        // Doing it twice does no harm; what is counted is what changes.
        let before = self.table.held(client).0;
        if !self.table.hand_over(client.family(), client, ranges) {
            return false;
        }
        to.leased += self.table.held(client).0 - before;
        true
    }

    /// The device has taken what is leased to a family.
    pub(super) fn lose_originals(&mut self, family: ClientId, ranges: &[WindowRange]) {
        for chunk in ranges.chunks(MAX_RANGES) {
            let message = Message::new(Kind::ForkLost).with_ranges(chunk);
            self.order(family.root(), message);
        }
    }

    fn order(&mut self, client: ClientId, message: Message) {
        if let Some(desk) = self.forks.desks.get_mut(&client) {
            // One that has ended shows when it is read.
            let _ = desk.send(message);
        }
    }

    /// Has a family copy its originals in `ranges`; recall `id` is answered
    /// when that is done.
    pub(super) fn evict(&mut self, family: ClientId, id: u64, ranges: &[WindowRange]) {
        let client = family.root();
        let chunks = ranges.chunks(MAX_RANGES);
        let last = chunks.len().saturating_sub(1);
        for (index, chunk) in chunks.enumerate() {
            let flags = if index == last { FORK_LAST } else { 0 };
            let message = Message::new(Kind::ForkEvict)
                .with_id(id)
                .with_flags(flags)
                .with_ranges(chunk);
            self.order(client, message);
        }
    }

    /// Families that hold originals, and what of it, at most `bytes` each.
    pub(super) fn originals(&self, bytes: u64) -> Vec<(ClientId, Vec<WindowRange>)> {
        let families = self.forks.desks.keys().map(|client| client.family());
        families
            .map(|family| (family, self.table.leased_by(family, bytes)))
            .filter(|(_, ranges)| !ranges.is_empty())
            .collect()
    }
}

/// What a server says next. One that died with something unread resets the
/// socket, once, before its last words can be read.
fn next_words(desk: BorrowedFd<'_>) -> Result<Message, SocketError> {
    match peek_message(desk) {
        Err(SocketError::Closed) => peek_message(desk),
        said => said,
    }
}

fn desk_name(client: ClientId) -> String {
    format!("{DESK}{}", client.0)
}
