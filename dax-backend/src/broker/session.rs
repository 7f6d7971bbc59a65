//! What clients say and what becomes of them.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use uuid::Uuid;

use super::connection::{ConnectionId, Phase};
use super::lease::ClientId;
use super::ledger::ClientRecord;
use super::liveness::{Liveness, Probe};
use super::peer::{Peer, is_gone, peer_pidfd};
use super::protocol::{
    GRANT_EXHAUSTED, GRANT_LAST, GRANULE, Kind, MAX_RANGES, Message, RefusedCode, Role, VERSION,
    WELCOME_USERFAULTFD, WindowRange,
};
use super::server::{Admit, Broker};
use super::socket::{Descriptors, SocketError};
use super::status::ProcessReport;
use crate::extent::ExtentTag;

/// Messages read from one socket before the others get their turn.
const BURST: usize = 32;
/// Requests of one client that wait until memory is wiped.
const REQUESTS: usize = 1024;
/// Tags that are remembered of one client.
const TAGS: usize = 16;

/// A process that holds leases, or may ask for them.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) connection: Option<ConnectionId>,
    pub(super) peer: Peer,
    /// The tags (null: none) of which it was told that there is nothing; to be
    /// told when there is.
    pub(super) starving: BTreeSet<ExtentTag>,
    /// All tags that it has asked for.
    tags: BTreeSet<ExtentTag>,
    pub(super) leased: u64,
    pub(super) recalls: u64,
    /// What it proves itself with.
    pub(super) key: u128,
    run: Option<Uuid>,
    command: String,
    liveness: Liveness,
    pub(super) pidfd: Option<OwnedFd>,
    pub(super) died: bool,
    pub(super) probe: Option<Probe>,
    /// Bytes still to be granted and their tag, for each request.
    requests: VecDeque<(u64, ExtentTag)>,
    /// What it says it has, while it rejoins.
    pub(super) claims: Vec<WindowRange>,
    pub(super) leased_peak: u64,
    leases: u64,
}

impl Client {
    /// One that is on record, and not connected.
    pub(super) fn known(record: ClientRecord, liveness: Liveness) -> Self {
        Self {
            connection: None,
            peer: record.peer,
            key: record.key,
            starving: BTreeSet::new(),
            tags: BTreeSet::new(),
            leased: 0,
            recalls: 0,
            run: record.run,
            command: record.command,
            liveness,
            pidfd: None,
            died: false,
            probe: None,
            requests: VecDeque::new(),
            claims: Vec::new(),
            leased_peak: 0,
            leases: 0,
        }
    }

    /// Readable when the process is dead.
    pub(super) fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(AsFd::as_fd)
    }

    /// A descriptor inherited by a child may keep the socket of a dead process open.
    pub(super) fn process_died(&mut self, now: Instant) {
        self.pidfd = None;
        self.died = true;
        self.probe.get_or_insert(Probe::start(now));
    }

    /// Whether its leases have ended.
    fn has_ended(&self) -> bool {
        let told = self.connection.is_some() || self.pidfd.is_some();
        let gone = || self.died || (!told && is_gone(self.peer.pid));
        self.liveness.look().ended(gone)
    }

    pub(super) fn probe_due(&self) -> Option<Instant> {
        self.probe.as_ref().map(Probe::due)
    }

    pub(super) fn report(&self, ended: bool) -> ProcessReport {
        ProcessReport {
            pid: self.peer.pid,
            uid: self.peer.uid,
            command: self.command.clone(),
            run: self.run,
            connected: self.connection.is_some(),
            ended,
            leased: self.leased,
            leased_peak: self.leased_peak,
            leases: self.leases,
            recalls: self.recalls,
            stats: self.liveness.stats(),
        }
    }

    /// Whether it waits for capacity.
    pub(super) fn is_starving(&self) -> bool {
        !self.starving.is_empty()
    }

    /// It wants to hear when there is capacity, of all kinds that it uses.
    pub(super) fn wants_more(&mut self) {
        self.starving.extend(self.tags.iter().copied());
    }

    /// Bytes that it holds and, by its own account, nothing uses.
    pub(super) fn unused(&self) -> u64 {
        let stats = self.liveness.stats();
        unused(
            self.leased,
            stats.extent_held_bytes,
            stats.extent_live_bytes,
        )
    }

    pub(super) fn run(&self) -> Option<Uuid> {
        self.run
    }
}

impl Broker {
    /// Reads what `id` has sent and sends what waits for it.
    pub(super) fn converse(&mut self, id: ConnectionId, now: Instant) {
        for _ in 0..BURST {
            let Some(connection) = self.connections.get_mut(&id) else {
                return;
            };
            let mut fds = Descriptors::default();
            let result = connection
                .flush()
                .and_then(|()| connection.receive(&mut fds));
            match result {
                Ok(None) => return,
                Ok(Some(message)) => self.dispatch(id, &message, fds, now),
                Err(error) => {
                    if matches!(error, SocketError::Protocol(_)) {
                        self.counters.malformed += 1;
                        self.refuse_unread(id);
                    }
                    self.close(id, now);
                }
            }
        }
    }

    fn dispatch(&mut self, id: ConnectionId, message: &Message, fds: Descriptors, now: Instant) {
        let Some(connection) = self.connections.get(&id) else {
            return;
        };
        match (connection.phase, message.kind()) {
            (Phase::New { .. }, Some(Kind::Hello)) => self.hello(id, message, now),
            (Phase::Rejoining(client), Some(Kind::Held)) => self.held(id, client, message, now),
            (Phase::Client(client), Some(Kind::Lease)) if self.may_request(client) => {
                self.lease_requested(client, message);
            }
            (Phase::Client(client), Some(Kind::ForkSetUp)) => {
                self.fork_set_up(client, message.arg(0), fds);
            }
            (Phase::Client(_), Some(Kind::ForkJoin)) => self.fork_join(message, fds),
            (Phase::Client(client), Some(Kind::Return)) => self.returned(client, message),
            (Phase::Client(client), Some(Kind::RecallAnswer)) => {
                self.recall_answered(client, message, now);
            }
            (Phase::Client(client), Some(Kind::RecallRefused)) => {
                self.recall_refused(client, message);
            }
            (Phase::Reading, Some(Kind::OpenShared)) => self.open_shared(id, message),
            (Phase::Admin, Some(Kind::AdminRequest)) => self.admin(id, fds, now),
            _ => {
                self.counters.malformed += 1;
                self.refuse_unread(id);
                self.close(id, now);
            }
        }
    }

    /// Tells a newcomer that it makes no sense; an established peer knows the protocol.
    fn refuse_unread(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id)
            && matches!(connection.phase, Phase::New { .. })
        {
            let _ = connection.send(refusal(RefusedCode::Malformed));
        }
    }

    fn hello(&mut self, id: ConnectionId, message: &Message, now: Instant) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let peer = connection.peer;
        let run = (u128::from(message.arg(1)) << 64) | u128::from(message.arg(2));
        let run = (run != 0).then(|| Uuid::from_u128(run));
        let owner = peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw();
        let (admitted, otherwise) = match self.config.admit {
            Admit::Itself => (peer.pid == std::process::id(), RefusedCode::Node),
            Admit::Owner => (owner, RefusedCode::User),
            Admit::Run(ours) => (owner || run == Some(ours), RefusedCode::User),
            Admit::Anyone => (true, RefusedCode::User),
        };
        let refused = if message.version() != VERSION {
            Some(RefusedCode::Version)
        } else if message.arg(0) == Role::Admin as u64 {
            (!owner).then_some(RefusedCode::User)
        } else if message.arg(0) == Role::Rejoin as u64 {
            self.rejoin(id, message, now).err()
        } else if ![Role::Client as u64, Role::Reader as u64].contains(&message.arg(0)) {
            Some(RefusedCode::Malformed)
        } else {
            (!admitted).then_some(otherwise)
        };
        if let Some(code) = refused {
            self.refuse(id, code, now);
        } else if message.arg(0) == Role::Rejoin as u64 {
            self.post(Some(id), Message::new(Kind::Welcome));
        } else if message.arg(0) != Role::Client as u64 {
            let welcomed = self.connections.get_mut(&id).is_some_and(|connection| {
                connection.phase = match message.arg(0) == Role::Admin as u64 {
                    true => Phase::Admin,
                    false => Phase::Reading,
                };
                connection.send(Message::new(Kind::Welcome)).is_ok()
            });
            if !welcomed {
                self.close(id, now);
            }
        } else if let Err(code) = self.welcome(id, run) {
            self.refuse(id, code, now);
        }
    }

    /// Turns a connection away.
    pub(super) fn refuse(&mut self, id: ConnectionId, code: RefusedCode, now: Instant) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let Peer { pid, uid, .. } = connection.peer;
            tracing::warn!(pid, uid, reason = ?code, "connection refused");
            let _ = connection.send(refusal(code));
        }
        self.counters.refused += 1;
        self.close(id, now);
    }

    fn welcome(&mut self, id: ConnectionId, run: Option<Uuid>) -> Result<(), RefusedCode> {
        let liveness = Liveness::new().map_err(|_| RefusedCode::Full)?;
        let client = self.new_number();
        let span = self.device.span();
        let peer = self.connections.get(&id).ok_or(RefusedCode::Full)?.peer;
        let record = ClientRecord {
            id: client,
            peer,
            run,
            command: command_of(peer.pid),
            key: liveness.key(),
        };
        // All that a broker after this one needs, before the client has anything.
        self.store.keep(&page_name(client), liveness.page());
        if !self.table.ledger.add_client(&record) {
            self.store.forget(&page_name(client));
            return Err(RefusedCode::Full);
        }
        let connection = self.connections.get_mut(&id).ok_or(RefusedCode::Full)?;
        let mut fds = vec![self.window.fd(), liveness.page()];
        let mut flags = 0;
        if let Some(userfaultfd) = &self.userfaultfd {
            fds.push(userfaultfd.as_fd());
            flags |= WELCOME_USERFAULTFD;
        }
        let message = Message::new(Kind::Welcome)
            .with_arg(0, self.window.len())
            .with_arg(1, GRANULE)
            .with_arg(2, u64::from(client.0))
            .with_arg(3, self.window.base())
            .with_flags(flags)
            .with_ranges(&[WindowRange {
                offset: span.start.0,
                len: span.len,
            }]);
        if connection.send_fds(&message, &fds).is_err() {
            self.table.ledger.remove_client(client);
            self.store.forget(&page_name(client));
            return Err(RefusedCode::Full);
        }
        connection.phase = Phase::Client(client);
        let pidfd = peer_pidfd(connection.fd());
        self.counters.clients += 1;
        tracing::info!(
            client = client.0,
            pid = peer.pid,
            uid = peer.uid,
            command = record.command,
            run = run.map(tracing::field::display),
            "client connected"
        );
        let mut welcomed = Client::known(record, liveness);
        welcomed.connection = Some(id);
        welcomed.pidfd = pidfd;
        self.clients.insert(client, welcomed);
        Ok(())
    }

    /// A number that nobody has: no client, and no family of one that is gone.
    /// There are more numbers than places for either.
    fn new_number(&mut self) -> ClientId {
        loop {
            let number = self.table.ledger.next_client();
            if !self.table.ledger.has_client(number) && !self.forks.has_family(number) {
                return number;
            }
        }
    }

    /// Whether as many requests as nobody has on purpose are unanswered.
    fn may_request(&self, id: ClientId) -> bool {
        let waiting = self.clients.get(&id).map_or(0, |c| c.requests.len());
        waiting < REQUESTS
    }

    fn lease_requested(&mut self, id: ClientId, message: &Message) {
        if let Some(client) = self.clients.get_mut(&id) {
            // More than the window has can't be granted; rounding up must not wrap.
            let (bytes, tag) = (message.arg(0).min(self.window.len()), message.tag());
            client.requests.push_back((bytes, tag));
            if client.tags.len() < TAGS {
                client.tags.insert(tag);
            }
            client.leases += 1;
            self.counters.leases += 1;
            self.device.hurry();
        }
    }

    /// Answers lease requests as far as there is zeroed memory; those for which
    /// memory is still being wiped wait.
    pub(super) fn grant_leases(&mut self) {
        let ids: Vec<ClientId> = self.clients.keys().copied().collect();
        for id in ids {
            while self.answer_lease(id) {}
        }
        let starving = self.clients.values().flat_map(|client| &client.starving);
        let starving: BTreeSet<ExtentTag> = starving.copied().collect();
        let fed = starving
            .into_iter()
            .filter(|tag| self.table.can_grant(*tag));
        let fed: BTreeSet<ExtentTag> = fed.collect();
        if !fed.is_empty() {
            self.announce_capacity(&fed);
        }
    }

    /// Grants what can be granted for the first request of `id`; whether that
    /// request is answered in full.
    fn answer_lease(&mut self, id: ClientId) -> bool {
        let Some(client) = self.clients.get_mut(&id) else {
            return false;
        };
        let Some(&(wanted, tag)) = client.requests.front() else {
            return false;
        };
        let granted = self.table.grant(id, wanted, tag);
        let bytes: u64 = granted.iter().map(|range| range.len).sum();
        let wanted = wanted.saturating_sub(bytes);
        let exhausted = wanted > 0 && !self.table.is_wiping(tag);
        let last = wanted == 0 || exhausted;
        if last {
            client.requests.pop_front();
        } else {
            client.requests[0] = (wanted, tag);
        }
        match exhausted && client.starving.len() < TAGS {
            true => client.starving.insert(tag),
            false => client.starving.remove(&tag),
        };
        client.leased += bytes;
        client.leased_peak = client.leased_peak.max(client.leased);
        self.counters.granted_bytes += bytes;
        let connection = client.connection;
        tracing::debug!(client = id.0, pid = client.peer.pid, bytes, "leased");
        if exhausted {
            tracing::info!(
                client = id.0,
                pid = client.peer.pid,
                missing = wanted,
                "extents ran out"
            );
            self.counters.exhausted += 1;
            // What has a tag only comes with it.
            self.short += if tag.is_null() { wanted } else { 0 };
        }
        let mut chunks: Vec<&[WindowRange]> = granted.chunks(MAX_RANGES).collect();
        if chunks.is_empty() && last {
            chunks.push(&[]);
        }
        for (index, chunk) in chunks.iter().enumerate() {
            let mut flags = 0;
            if last && index + 1 == chunks.len() {
                flags |= GRANT_LAST;
                flags |= if exhausted { GRANT_EXHAUSTED } else { 0 };
            }
            let bytes = chunk.iter().map(|range| range.len).sum();
            let message = Message::new(Kind::Grant)
                .with_arg(0, bytes)
                .with_tag(tag)
                .with_flags(flags)
                .with_ranges(chunk);
            self.post(connection, message);
        }
        last
    }

    fn announce_capacity(&mut self, of: &BTreeSet<ExtentTag>) {
        let mut hungry = Vec::new();
        for client in self.clients.values_mut() {
            if !client.starving.is_disjoint(of) {
                // It asks again for all that it lacks.
                client.starving.clear();
                hungry.push(client.connection);
            }
        }
        for connection in hungry {
            self.post(connection, Message::new(Kind::CapacityAvailable));
        }
    }

    fn returned(&mut self, id: ClientId, message: &Message) {
        for range in message.ranges().as_slice() {
            match self.table.give_back(id, *range) {
                Ok(leased) => {
                    tracing::debug!(client = id.0, bytes = leased, "returned");
                    self.counters.returned_bytes += leased;
                    if let Some(client) = self.clients.get_mut(&id) {
                        client.leased -= leased;
                    }
                }
                Err(_) => self.counters.malformed += 1,
            }
        }
        self.claim_for_recall();
        self.tell_progress();
    }

    /// Sends `message` if there is still somebody to send it to.
    pub(super) fn post(&mut self, connection: Option<ConnectionId>, message: Message) {
        if let Some(connection) = connection.and_then(|id| self.connections.get_mut(&id)) {
            // A broken socket shows again when it is read.
            let _ = connection.send(message);
        }
    }

    /// Closes a connection. Its client's leases go on until nobody maps them.
    pub(super) fn close(&mut self, id: ConnectionId, now: Instant) {
        let Some(connection) = self.connections.remove(&id) else {
            return;
        };
        if let Phase::Reader(reader) = connection.phase {
            self.reader_closed(reader, now);
        }
        if let Phase::Client(client_id) | Phase::Rejoining(client_id) = connection.phase
            && let Some(client) = self.clients.get_mut(&client_id)
        {
            tracing::debug!(
                client = client_id.0,
                pid = client.peer.pid,
                "connection closed"
            );
            client.connection = None;
            client.claims.clear();
            client.requests.clear();
            client.starving.clear();
            client.probe.get_or_insert(Probe::start(now));
        }
    }

    /// Ends the leases of clients that nobody maps any more.
    pub(super) fn probe_clients(&mut self, now: Instant) {
        let (mut ended, mut silent) = (Vec::new(), Vec::new());
        for (id, client) in &mut self.clients {
            if client.probe_due().is_none_or(|due| due > now) {
                continue;
            }
            if client.has_ended() {
                ended.push(*id);
            } else if let Some(probe) = &mut client.probe {
                probe.again(now);
                if client.connection.is_none() && probe.is_hopeless(now) {
                    silent.push(*id);
                }
            }
        }
        for id in ended {
            let Some(mut client) = self.clients.remove(&id) else {
                continue;
            };
            let returned = self.table.end(id);
            tracing::info!(
                client = id.0,
                pid = client.peer.pid,
                command = client.command,
                returned,
                "client ended"
            );
            self.counters.returned_bytes += returned;
            self.table.ledger.remove_client(id);
            self.store.forget(&page_name(id));
            self.counters.clients_ended += 1;
            client.leased = 0;
            if let Some(connection) = client.connection.take() {
                self.connections.remove(&connection);
            }
            self.runs.ended(client.report(true));
            self.claim_for_recall();
            self.hand_over_returned();
            self.recall_unanswerable(id, now);
        }
        for id in silent {
            self.recall_unanswerable(id, now);
        }
    }
}

/// Of `leased` bytes, what a client does not use that by its own account has
/// `held` on extents and `live` there. It counts what it has shared by a fork,
/// which is no lease any more, and of which nothing is free for others.
fn unused(leased: u64, held: u64, live: u64) -> u64 {
    let shared = held.saturating_sub(leased);
    leased.saturating_sub(live.saturating_sub(shared))
}

/// What the keeper calls the page of a client.
pub(super) fn page_name(client: ClientId) -> String {
    format!("page-{}", client.0)
}

fn refusal(code: RefusedCode) -> Message {
    Message::new(Kind::Refused)
        .with_arg(0, code as u64)
        .with_arg(1, u64::from(VERSION))
}

/// The process's name, for people; empty when it can't be seen.
fn command_of(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm"))
        .map(|name| name.trim_end().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_fork_shares_is_not_what_uses_leases() {
        assert_eq!(unused(100, 100, 60), 40);
        // 80 were leased, all of them in use, and 60 are the family's.
        assert_eq!(unused(20, 80, 80), 0);
        // Just what it shares is in use.
        assert_eq!(unused(40, 100, 60), 40);
        // Nothing was published yet; or before the last grant.
        assert_eq!(unused(100, 0, 0), 100);
        assert_eq!(unused(100, 80, 80), 20);
    }
}
