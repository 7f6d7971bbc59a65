//! Properties of staging under any sequence of records, losses and pauses.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use dax_backend::address::{Dpa, DpaRange};
use dax_backend::extent::{Extent, ExtentTag};
use dax_backend::region::DcRegion;
use dax_backend::staging::{
    Closed, Decision, Staging, StagingAction, StagingEvent, StagingLimits, TakeWhole, judge,
};
use proptest::prelude::*;

const TIMEOUT: Duration = Duration::from_secs(20);
const MAX_EXTENTS: usize = 6;

/// One step of a device's life, as staging sees it.
#[derive(Clone, Copy, Debug)]
enum Step {
    Add {
        more: bool,
    },
    RecordsLost,
    /// So many seconds pass, and staging looks at the clock.
    Pause(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any::<bool>().prop_map(|more| Step::Add { more }),
        4 => Just(Step::Add { more: true }),
        1 => Just(Step::RecordsLost),
        2 => (0..30u64).prop_map(Step::Pause),
    ]
}

/// An extent that tells its number.
fn numbered(number: u64) -> Extent {
    Extent::untagged(DpaRange {
        start: Dpa(number << 21),
        len: 1 << 21,
    })
}

/// What a chain of records is owed, by the plainest account of the rules.
#[derive(Default)]
struct Expected {
    /// Numbers of the records of the open group; `None` if none is open.
    open: Option<Vec<u64>>,
    discarding: bool,
    idle: u64,
}

impl Expected {
    fn close(&mut self, closed: Closed) -> Option<(Vec<u64>, Closed)> {
        self.open.take().map(|numbers| (numbers, closed))
    }

    fn step(&mut self, step: Step, number: u64) -> Option<(Vec<u64>, Closed)> {
        match step {
            Step::Add { more } if self.discarding => {
                self.discarding = more;
                None
            }
            Step::Add { more } => {
                self.idle = 0;
                let open = self.open.get_or_insert_default();
                if open.len() == MAX_EXTENTS {
                    self.discarding = more;
                    return self.close(Closed::TooLarge);
                }
                open.push(number);
                if more {
                    None
                } else {
                    self.close(Closed::Complete)
                }
            }
            Step::RecordsLost => {
                self.discarding = false;
                self.close(Closed::Truncated)
            }
            Step::Pause(seconds) => {
                self.idle += seconds;
                if self.open.is_none() || self.idle < TIMEOUT.as_secs() {
                    return None;
                }
                self.discarding = true;
                self.close(Closed::TimedOut)
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    /// Exactly one answer per group, never one with no group open, in the order of the records,
    /// and every record in at most one group.
    #[test]
    fn each_group_is_answered_once_and_in_order(steps in prop::collection::vec(step(), 0..80)) {
        let limits = StagingLimits { timeout: TIMEOUT, max_extents: MAX_EXTENTS };
        let mut staging = Staging::new(limits);
        let mut expected = Expected::default();
        let mut now = Instant::now();
        let mut last_answered = None;
        for (number, step) in steps.into_iter().enumerate() {
            let number = number as u64;
            let was_open = !staging.open_extents().is_empty();
            let event = match step {
                Step::Add { more } => StagingEvent::Add { extent: numbered(number), more },
                Step::RecordsLost => StagingEvent::RecordsLost,
                Step::Pause(seconds) => {
                    now += Duration::from_secs(seconds);
                    StagingEvent::Tick
                }
            };
            let action = staging.step(now, event);
            let answered = match action {
                StagingAction::Answer(group) => {
                    prop_assert!(
                        was_open || matches!(step, Step::Add { .. }),
                        "an answer with no group open"
                    );
                    let numbers: Vec<u64> =
                        group.extents.iter().map(|extent| extent.range.start.0 >> 21).collect();
                    for number in &numbers {
                        prop_assert!(last_answered.is_none_or(|last| last < *number));
                        last_answered = Some(*number);
                    }
                    prop_assert!(staging.open_extents().is_empty());
                    Some((numbers, group.closed))
                }
                StagingAction::Wait | StagingAction::Discarded { .. } => None,
            };
            prop_assert_eq!(answered, expected.step(step, number));
            prop_assert_eq!(staging.is_discarding(), expected.discarding);
        }
    }

    /// Stopped and resumed anywhere, staging goes on as if nothing had happened.
    #[test]
    fn resuming_changes_nothing(
        steps in prop::collection::vec(any::<bool>(), 1..40),
        at in any::<prop::sample::Index>(),
    ) {
        let limits = StagingLimits { timeout: TIMEOUT, max_extents: MAX_EXTENTS };
        let now = Instant::now();
        let mut whole = Staging::new(limits);
        let mut parts = Staging::new(limits);
        let at = at.index(steps.len());
        for (number, more) in steps.into_iter().enumerate() {
            if number == at {
                let (open, discarding) = (parts.open_extents().to_vec(), parts.is_discarding());
                parts = Staging::resume(limits, open, discarding, now);
            }
            let event = StagingEvent::Add { extent: numbered(number as u64), more };
            prop_assert_eq!(whole.step(now, event), parts.step(now, event));
        }
    }

    /// What is accepted of any group whatever lies in a DC region in whole blocks, overlaps
    /// nothing that is held or accepted with it, and comes in the order of the offer.
    #[test]
    fn verdicts_accept_only_what_is_sound(
        offers in prop::collection::vec(
            (0..48u64, prop_oneof![Just(0u64), 1..6u64, Just(u64::MAX)], 0..3u8, 0..3u16, any::<bool>()),
            0..20,
        ),
    ) {
        const BLOCK: u64 = 1 << 20;
        let region = |index: u8, base: u64| DcRegion {
            index,
            base: Dpa(base),
            decode_len: 256 << 20,
            len: 16 * BLOCK,
            block_size: BLOCK,
            sanitizes: false,
            dsmad_handle: 0,
        };
        let regions = [region(0, 0), region(1, 256 << 20)];
        let held = [Extent::untagged(DpaRange { start: Dpa(4 * BLOCK), len: 2 * BLOCK })];
        let offered: Vec<Extent> = offers
            .into_iter()
            .map(|(place, blocks, tag, shared_seq, crooked)| {
                // Places 0 to 23 lie in or just behind region 0, the rest by region 1.
                let base = if place < 24 { 0 } else { 256 << 20 };
                let start = base + place % 24 * BLOCK + if crooked && place % 5 == 0 { 4096 } else { 0 };
                Extent {
                    range: DpaRange { start: Dpa(start), len: blocks.saturating_mul(BLOCK) },
                    tag: ExtentTag([tag; 16]),
                    shared_seq: if tag == 0 { 0 } else { shared_seq },
                }
            })
            .collect();
        let verdict = judge(&offered, &regions, &held, &mut TakeWhole);
        prop_assert_eq!(verdict.decisions.len(), offered.len());
        let mut accepted: Vec<DpaRange> = held.iter().map(|extent| extent.range).collect();
        for (extent, decision) in offered.iter().zip(&verdict.decisions) {
            let Decision::Accept(range) = decision else { continue };
            prop_assert_eq!(*range, extent.range);
            prop_assert!(!range.is_empty() && range.is_aligned(Dpa(0), BLOCK));
            prop_assert!(regions.iter().any(|region| region.range().contains(range)));
            prop_assert!(!accepted.iter().any(|other| other.intersects(range)));
            accepted.push(*range);
        }
        prop_assert_eq!(verdict.accepted(), &accepted[1..]);
    }
}
