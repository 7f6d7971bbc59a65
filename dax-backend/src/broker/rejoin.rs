//! Clients of a broker that died, and how they find back to the one after it.
//!
//! The ledger says who holds what, and the client says what it has. A grant
//! that never arrived and a return that was never heard show as a lease that the
//! client does not claim, and ends. The other way round nothing can happen but
//! a lie: who claims what it does not hold is refused.
#![forbid(unsafe_code)]

use std::time::Instant;

use super::connection::{ConnectionId, Phase};
use super::lease::ClientId;
use super::liveness::{Liveness, Probe};
use super::peer::peer_pidfd;
use super::protocol::{
    HELD_LAST, Kind, MAX_RANGES, Message, RECALL_LOST, RefusedCode, WindowRange,
};
use super::server::Broker;
use super::session::{Client, page_name};

impl Broker {
    /// Takes over the clients that an earlier broker had. Each is watched until
    /// it rejoins, in case it has ended meanwhile.
    pub(super) fn adopt_clients(&mut self, now: Instant) {
        for record in self.table.ledger.clients() {
            let id = record.id;
            let Some(page) = self.store.take(&page_name(id)) else {
                // Nothing can say when its leases end, so they never do.
                continue;
            };
            let mut client = Client::known(record, Liveness::adopt(page));
            client.leased = self.table.held(id).0;
            client.leased_peak = client.leased;
            client.probe = Some(Probe::start(now));
            self.clients.insert(id, client);
            self.counters.clients_adopted += 1;
        }
    }

    /// A process says that it is a client already.
    pub(super) fn rejoin(
        &mut self,
        id: ConnectionId,
        message: &Message,
        now: Instant,
    ) -> Result<(), RefusedCode> {
        let key = u128::from(message.arg(1)) << 64 | u128::from(message.arg(2));
        let claimed = u32::try_from(message.id()).map_err(|_| RefusedCode::Leases)?;
        let client_id = ClientId(claimed);
        let client = self.clients.get_mut(&client_id);
        let client = client
            .filter(|client| client.key == key)
            .ok_or(RefusedCode::Leases)?;
        // It knows better whether its old connection is of any use.
        if let Some(old) = client.connection.take() {
            self.close(old, now);
        }
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.phase = Phase::Rejoining(client_id);
        }
        if let Some(client) = self.clients.get_mut(&client_id) {
            client.connection = Some(id);
        }
        Ok(())
    }

    /// A client that rejoins says what it has.
    pub(super) fn held(
        &mut self,
        id: ConnectionId,
        client_id: ClientId,
        message: &Message,
        now: Instant,
    ) {
        let Some(client) = self.clients.get_mut(&client_id) else {
            return;
        };
        client.claims.extend(message.ranges().as_slice());
        let too_many = client.claims.len() > self.table.slots.len() + MAX_RANGES;
        if !too_many && message.flags() & HELD_LAST == 0 {
            return;
        }
        let claims = std::mem::take(&mut client.claims);
        if too_many || self.table.settle_claims(client_id, &claims).is_err() {
            return self.refuse(id, RefusedCode::Leases, now);
        }
        self.rejoined(id, client_id);
    }

    fn rejoined(&mut self, id: ConnectionId, client_id: ClientId) {
        let (leased, lost) = self.table.held(client_id);
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        connection.phase = Phase::Client(client_id);
        let (peer, pidfd) = (connection.peer, peer_pidfd(connection.fd()));
        if let Some(client) = self.clients.get_mut(&client_id) {
            client.peer = peer;
            client.pidfd = pidfd;
            client.died = false;
            client.probe = None;
            client.leased = leased;
        }
        self.counters.rejoined += 1;
        self.post(Some(id), Message::new(Kind::Welcome));
        self.tell_lost(client_id, &lost);
        self.claim_for_recall();
    }

    /// Tells a client that the memory of `ranges` is gone.
    pub(super) fn tell_lost(&mut self, id: ClientId, ranges: &[WindowRange]) {
        let Some(client) = self.clients.get(&id) else {
            return;
        };
        let connection = client.connection;
        for chunk in ranges.chunks(MAX_RANGES) {
            let message = Message::new(Kind::Recall)
                .with_id(self.recalls.next_message())
                .with_arg(0, chunk.iter().map(|range| range.len).sum())
                .with_flags(RECALL_LOST)
                .with_ranges(chunk);
            self.post(connection, message);
        }
    }
}
