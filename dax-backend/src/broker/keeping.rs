//! Doing what the capacity policy wants: asking the orchestrator, thinning
//! clients, giving back.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::lease::ClientId;
use super::policy::{Pool, Wish};
use super::protocol::{GRANULE, Kind, Message, RECALL_UNUSED};
use super::recall::{RecallRequest, Target};
use super::receipt::Origin;
use super::server::Broker;

/// How often the pool is looked at when nobody lacks anything.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long clients may take to return what they do not use.
const THIN_PATIENCE: Duration = Duration::from_secs(1);

impl Broker {
    /// Has the policy look at the pool, and does what it wants.
    pub(super) fn keep_marks(&mut self, now: Instant) {
        let idle = self.short == 0 && now < self.look_again;
        // What is asked back now is not asked for in the same breath.
        if self.config.policy.is_none() || idle || self.recalls.active.is_some() {
            return;
        }
        self.look_again = now + LOOK_EVERY;
        let pool = Pool {
            free: self.table.available_bytes(),
            short: std::mem::take(&mut self.short),
            orchestrator: self.fabric.is_some(),
        };
        match self.policy.wish(pool, now) {
            Some(Wish::More(bytes)) => {
                tracing::info!(bytes, free = pool.free, "asking the orchestrator for more");
                self.ask_for_more(bytes, now);
            }
            Some(Wish::Thin(bytes)) => {
                tracing::info!(bytes, "asking clients for what they do not use");
                self.thin(bytes);
            }
            Some(Wish::Less(bytes)) => self.recall(
                RecallRequest {
                    origin: Origin::Policy,
                    target: Target::Bytes(bytes),
                    // What is free, and nobody is asked.
                    patience: Duration::ZERO,
                    past_deadline: false,
                    requester: None,
                    progress: false,
                    requested: now,
                },
                now,
            ),
            None => {}
        }
    }

    /// Asks clients for up to `bytes` of what they hold and do not use: those
    /// that use least of what they hold first. It stays with the broker.
    fn thin(&mut self, bytes: u64) {
        let mut unused: Vec<(u64, ClientId)> = self
            .clients
            .iter()
            .filter(|(_, client)| client.connection.is_some() && client.leased > 0)
            .map(|(id, client)| (client.unused(), *id))
            .collect();
        unused.sort_by_key(|(unused, _)| std::cmp::Reverse(*unused));
        let mut left = bytes;
        for (unused, id) in unused {
            if left == 0 {
                break;
            }
            let Some(client) = self.clients.get_mut(&id) else {
                continue;
            };
            // Its caches count as used until it drops them.
            let share = left.min(client.leased).next_multiple_of(GRANULE);
            left = left.saturating_sub(unused);
            client.recalls += 1;
            let connection = client.connection;
            let message = Message::new(Kind::Recall)
                .with_id(self.recalls.next_message())
                .with_arg(0, share)
                .with_arg(1, THIN_PATIENCE.as_millis() as u64)
                .with_flags(RECALL_UNUSED);
            self.post(connection, message);
        }
    }
}
