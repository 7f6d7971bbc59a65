//! The capacity policy: marks, steps, and what a broker does that gets no more.

use std::time::Duration;

use dax_backend::broker::receipt::Origin;
use dax_backend::broker::{CapacityPolicy, FromBroker, GRANULE, RecallOutcome, WindowRange};

use crate::rig::{Client, PATIENCE, Rig, Setup, total};

const POLICY: CapacityPolicy = CapacityPolicy {
    low: 4 * GRANULE,
    high: 20 * GRANULE,
    step: 8 * GRANULE,
    cool_down: Duration::from_millis(200),
};

fn rig(offer: &'static [u64], orchestrator: bool) -> Rig {
    Rig::with(Setup {
        offer,
        orchestrator,
        policy: Some(POLICY),
        ..Setup::default()
    })
}

/// What a client is asked for that is not to move anything.
fn asked_for_unused(client: &Client) -> (u64, u64) {
    loop {
        match client.next() {
            FromBroker::Recall {
                id,
                bytes,
                unused: true,
                ..
            } => return (id, bytes),
            FromBroker::CapacityAvailable => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_pool_that_runs_low_is_filled_up_before_anybody_lacks_anything() {
    let rig = rig(&[16], true);
    let client = rig.client();
    assert!(!client.lease(13).1);
    let status = rig.until(PATIENCE, |status| status.capacity.free == 11 * GRANULE);
    assert_eq!(status.policy.asked, 1);
    assert_eq!(status.policy.added_bytes, 8 * GRANULE);
    assert_eq!(status.counters.exhausted, 0);
    assert_eq!(status.extents.len(), 2);
}

#[test]
fn whoever_lacks_capacity_gets_it_from_the_orchestrator() {
    let rig = rig(&[8], true);
    let client = rig.client();
    let (ranges, exhausted) = client.lease(30);
    assert_eq!((total(&ranges), exhausted), (8 * GRANULE, true));
    // All that is missing, in steps, in one go.
    assert!(matches!(client.next(), FromBroker::CapacityAvailable));
    assert_eq!(total(&client.lease(22).0), 22 * GRANULE);
    let status = rig.status();
    assert!(status.policy.added_bytes >= 24 * GRANULE, "{status:?}");
}

#[test]
fn what_is_free_above_the_high_mark_goes_back_and_has_a_receipt() {
    let rig = rig(&[16, 16], true);
    let client = rig.client();
    // Leased memory is none of the policy's business.
    let (ranges, _) = client.lease(16);
    std::thread::sleep(3 * POLICY.cool_down);
    assert_eq!(rig.status().capacity.accepted, 32 * GRANULE);
    client.give_back(&ranges);
    let status = rig.until(PATIENCE, |status| status.capacity.accepted == 24 * GRANULE);
    let receipt = rig.until(PATIENCE, |status| !status.receipts.is_empty());
    let receipt = receipt.receipts.last().unwrap();
    assert_eq!(receipt.origin, Origin::Policy);
    assert_eq!(
        (receipt.asked, receipt.returned_free),
        (8 * GRANULE, 8 * GRANULE)
    );
    assert_eq!(status.capacity.leased, 0);
    // No further: another step would leave less than the high mark.
    std::thread::sleep(3 * POLICY.cool_down);
    let status = rig.status();
    assert_eq!(status.capacity.accepted, 24 * GRANULE);
    assert_eq!(status.policy.given_back_bytes, 8 * GRANULE);
    assert_eq!(status.policy.asked, 0);
    assert_eq!(rig.model.audit().violations, Vec::<String>::new());
}

#[test]
fn where_there_is_no_more_clients_give_what_they_do_not_use_to_others() {
    let rig = rig(&[16], false);
    let [has, lacks] = [rig.client(), rig.client()];
    let (held, _) = has.lease(16);
    assert!(lacks.lease(2).1);
    let (id, bytes) = asked_for_unused(&has);
    assert_eq!(bytes, 4 * GRANULE, "up to the low mark");
    has.give_back(&[WindowRange {
        offset: held[0].offset,
        len: 2 * GRANULE,
    }]);
    let answer = RecallOutcome {
        idle: 2 * GRANULE,
        ..RecallOutcome::default()
    };
    has.broker.answer_recall(id, &answer).unwrap();
    while !matches!(lacks.next(), FromBroker::CapacityAvailable) {}
    assert_eq!(total(&lacks.lease(2).0), 2 * GRANULE);
    let status = rig.status();
    // The device has nothing of it.
    assert_eq!(status.capacity.accepted, 16 * GRANULE);
    assert!(status.policy.thinned >= 1 && status.receipts.is_empty());
}

#[test]
fn an_orchestrator_that_has_nothing_is_asked_again_and_its_reason_shown() {
    // Of 256 granules all are offered.
    let rig = rig(&[256], true);
    let client = rig.client();
    client.lease(255);
    let status = rig.until(PATIENCE, |status| status.policy.refused >= 2);
    let reason = status.policy.last_refusal.unwrap();
    assert!(reason.contains("0 bytes are free"), "{reason}");
    let asked = status.policy.asked;
    assert!(asked >= 2 && status.policy.thinned >= 1, "{asked}");
}
