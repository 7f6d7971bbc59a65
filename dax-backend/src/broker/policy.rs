//! The broker's capacity policy: when it wants more of the orchestrator, and
//! when it gives some back.
//!
//! CXL has no command by which a host asks its device for more, so this is
//! where that begins. Rules without any I/O, and without a clock of their own;
//! `keeping` does what they say.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::protocol::GRANULE;

/// How much free capacity a broker keeps. Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapacityPolicy {
    /// Below so much that is free, more is asked for.
    pub low: u64,
    /// What is free above so much goes back.
    pub high: u64,
    /// How much is asked for or given back at a time, or multiples of it.
    pub step: u64,
    /// How long the broker waits before it asks again, and how long capacity
    /// must have been above the high mark before it goes back.
    pub cool_down: Duration,
}

/// Why a [`CapacityPolicy`] makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PolicyError {
    /// The step is no capacity.
    #[error("a step of {step} bytes is not a positive multiple of {GRANULE}, a granule")]
    Step {
        /// What was given, in bytes.
        step: u64,
    },
    /// What was just added would go back at once.
    #[error(
        "a high mark of {high} bytes is less than the low mark of {low} and one step of {step}: \
         what is added would go back at once"
    )]
    Marks {
        /// The low mark.
        low: u64,
        /// The high mark.
        high: u64,
        /// The step.
        step: u64,
    },
}

impl CapacityPolicy {
    /// Checks that the marks are as far apart as they must be.
    ///
    /// # Errors
    /// [`PolicyError`]
    pub fn check(&self) -> Result<(), PolicyError> {
        let Self {
            low, high, step, ..
        } = *self;
        if step == 0 || !step.is_multiple_of(GRANULE) {
            return Err(PolicyError::Step { step });
        }
        match low.checked_add(step) {
            Some(least) if least <= high => Ok(()),
            _ => Err(PolicyError::Marks { low, high, step }),
        }
    }
}

/// What the policy has done, for `dcm status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyStatus {
    /// The rules.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub rules: Option<CapacityPolicy>,
    /// Times that more was asked for.
    pub asked: u64,
    /// Bytes that came of it.
    pub added_bytes: u64,
    /// Times that the orchestrator had nothing to give.
    pub refused: u64,
    /// Bytes given back because too much was free.
    pub given_back_bytes: u64,
    /// Times that clients were asked for what they do not use.
    pub thinned: u64,
    /// What the orchestrator last refused, and why.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub last_refusal: Option<String>,
}

/// What the policy wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// The orchestrator adds so much.
    More(u64),
    /// Clients return so much of what they do not use: there is no more to be had.
    Thin(u64),
    /// So much that is free goes back to the device.
    Less(u64),
}

/// The state of affairs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pool {
    /// Bytes that could be leased, or could once they are wiped.
    pub(super) free: u64,
    /// Bytes that clients asked for and did not get.
    pub(super) short: u64,
    /// There is somebody to ask for more.
    pub(super) orchestrator: bool,
}

/// The policy at work.
#[derive(Debug, Default)]
pub(super) struct Policy {
    pub(super) status: PolicyStatus,
    /// An answer of the orchestrator is on its way.
    asking: bool,
    /// The orchestrator had nothing the last time.
    dry: bool,
    /// Nobody is asked before this.
    rest_until: Option<Instant>,
    /// Since when more than enough is free.
    plenty_since: Option<Instant>,
}

impl Policy {
    pub(super) fn new(rules: Option<CapacityPolicy>) -> Self {
        Self {
            status: PolicyStatus {
                rules,
                ..PolicyStatus::default()
            },
            ..Self::default()
        }
    }

    /// What is to be done now, if anything is. It counts as done.
    pub(super) fn wish(&mut self, pool: Pool, now: Instant) -> Option<Wish> {
        let rules = self.status.rules?;
        if pool.free <= rules.high || pool.short > 0 {
            self.plenty_since = None;
        }
        if pool.short > 0 || pool.free < rules.low {
            if self.asking || self.rest_until.is_some_and(|until| now < until) {
                return None;
            }
            self.rest_until = Some(now + rules.cool_down);
            let missing = pool.short.max(rules.low.saturating_sub(pool.free));
            // Who had nothing may have something the next time.
            if pool.orchestrator && !std::mem::take(&mut self.dry) {
                self.asking = true;
                self.status.asked += 1;
                return Some(Wish::More(missing.next_multiple_of(rules.step)));
            }
            self.status.thinned += 1;
            return Some(Wish::Thin(missing));
        }
        let over = pool.free.saturating_sub(rules.high);
        let since = *self.plenty_since.get_or_insert(now);
        let steps = over / rules.step * rules.step;
        if steps > 0 && !self.asking && now.saturating_duration_since(since) >= rules.cool_down {
            self.plenty_since = None;
            return Some(Wish::Less(steps));
        }
        None
    }

    /// The orchestrator has added so much.
    pub(super) fn added(&mut self, bytes: u64) {
        self.asking = false;
        self.dry = bytes == 0;
        self.status.added_bytes += bytes;
    }

    /// The orchestrator adds nothing.
    pub(super) fn refused(&mut self, why: String) {
        self.asking = false;
        self.dry = true;
        self.status.refused += 1;
        // Who lacks capacity need not wait as long as for the next answer.
        self.rest_until = None;
        self.status.last_refusal = Some(why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const RULES: CapacityPolicy = CapacityPolicy {
        low: 64 * MIB,
        high: 256 * MIB,
        step: 128 * MIB,
        cool_down: Duration::from_secs(10),
    };

    fn pool(free: u64, short: u64) -> Pool {
        Pool {
            free: free * MIB,
            short: short * MIB,
            orchestrator: true,
        }
    }

    #[test]
    fn below_the_low_mark_it_asks_once_and_rests() {
        let (mut policy, start) = (Policy::new(Some(RULES)), Instant::now());
        assert_eq!(policy.wish(pool(64, 0), start), None);
        assert_eq!(policy.wish(pool(62, 0), start), Some(Wish::More(128 * MIB)));
        let late = start + Duration::from_secs(60);
        assert_eq!(policy.wish(pool(62, 0), late), None, "an answer is awaited");
        policy.added(128 * MIB);
        let soon = start + Duration::from_secs(9);
        assert_eq!(policy.wish(pool(10, 0), soon), None, "it rests");
        assert_eq!(policy.wish(pool(10, 0), late), Some(Wish::More(128 * MIB)));
        assert_eq!(policy.status.asked, 2);
        assert_eq!(policy.status.added_bytes, 128 * MIB);
    }

    #[test]
    fn what_clients_lack_is_asked_for_in_steps() {
        let mut policy = Policy::new(Some(RULES));
        let wish = policy.wish(pool(500, 300), Instant::now());
        assert_eq!(wish, Some(Wish::More(384 * MIB)));
    }

    #[test]
    fn where_nobody_has_more_clients_are_thinned() {
        let (mut policy, now) = (Policy::new(Some(RULES)), Instant::now());
        assert!(matches!(policy.wish(pool(0, 10), now), Some(Wish::More(_))));
        policy.refused("nothing left".into());
        assert_eq!(policy.wish(pool(0, 10), now), Some(Wish::Thin(64 * MIB)));
        assert_eq!(policy.wish(pool(0, 10), now), None, "it rests");
        // And the orchestrator is asked again.
        let later = now + RULES.cool_down;
        let again = policy.wish(pool(0, 10), later);
        assert_eq!(again, Some(Wish::More(128 * MIB)));

        let mut alone = Policy::new(Some(RULES));
        let pool = Pool {
            orchestrator: false,
            ..pool(60, 0)
        };
        assert_eq!(alone.wish(pool, now), Some(Wish::Thin(4 * MIB)));
    }

    #[test]
    fn what_is_over_the_high_mark_for_long_goes_back_in_steps() {
        let (mut policy, start) = (Policy::new(Some(RULES)), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(policy.wish(pool(600, 0), at(0)), None);
        assert_eq!(policy.wish(pool(600, 0), at(9)), None);
        // Not over it all the time.
        assert_eq!(policy.wish(pool(200, 0), at(9)), None);
        assert_eq!(policy.wish(pool(600, 0), at(10)), None);
        assert_eq!(
            policy.wish(pool(600, 0), at(20)),
            Some(Wish::Less(256 * MIB))
        );
        // Less than a step stays.
        assert_eq!(policy.wish(pool(344, 0), at(30)), None);
        assert_eq!(policy.wish(pool(344, 0), at(60)), None);
    }

    #[test]
    fn without_rules_nothing_is_done() {
        let mut policy = Policy::new(None);
        assert_eq!(policy.wish(pool(0, 900), Instant::now()), None);
    }

    #[test]
    fn marks_too_close_and_steps_of_no_size_are_refused() {
        let with = |low, high, step| {
            let rules = CapacityPolicy {
                low,
                high,
                step,
                ..RULES
            };
            rules.check()
        };
        assert_eq!(RULES.check(), Ok(()));
        assert!(matches!(with(0, MIB, 0), Err(PolicyError::Step { .. })));
        assert!(matches!(with(0, MIB, MIB), Err(PolicyError::Step { .. })));
        let close = with(64 * MIB, 65 * MIB, 2 * MIB);
        assert!(matches!(close, Err(PolicyError::Marks { .. })));
        assert!(with(u64::MAX, u64::MAX, 2 * MIB).is_err());
    }
}
