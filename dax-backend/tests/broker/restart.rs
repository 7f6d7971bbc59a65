//! A broker that dies, and the one after it.

use std::thread;
use std::time::Duration;

use dax_backend::address::DpaRange;
use dax_backend::broker::admin::ReleaseTarget;
use dax_backend::broker::protocol::RefusedCode;
use dax_backend::broker::{
    BrokerClient, ConnectError, FromBroker, GRANULE, RecallOutcome, WindowRange,
};
use dax_backend::model::{Fault, FaultKind, ReleasePolicy};

use crate::rig::{Client, PATIENCE, Rig, is_zero, scribble, total};

fn rejoin(rig: &Rig, client: &mut Client, held: &[WindowRange]) -> Result<(), ConnectError> {
    let welcome = &client.welcome;
    let held = held.iter().copied();
    client.broker = BrokerClient::rejoin(&rig.socket(), welcome.client_id, &welcome.page, held)?;
    Ok(())
}

fn granules(first: u64, count: u64) -> WindowRange {
    WindowRange {
        offset: first * GRANULE,
        len: count * GRANULE,
    }
}

#[test]
fn leases_outlive_the_broker_and_its_successor_recalls_them() {
    let mut rig = Rig::new(&[16]);
    let (mut first, second) = (rig.client(), rig.client());
    let (ranges, _) = first.lease(6);
    second.lease(2);
    let memory = first.memory();
    scribble(memory, &ranges);
    rig.restart(|_| ());
    // Before anybody says a word, nobody has lost anything.
    let status = rig.status();
    assert_eq!(status.capacity.leased, 8 * GRANULE);
    assert_eq!(status.counters.clients_adopted, 2);
    assert_eq!(total(&rig.client().lease(16).0), 8 * GRANULE);

    rejoin(&rig, &mut first, &ranges).unwrap();
    assert!(!is_zero(memory, &ranges[..1]));
    thread::scope(|scope| {
        scope.spawn(|| {
            let (id, bytes, ..) = first.next_recall();
            assert!(bytes >= 2 * GRANULE, "{bytes}");
            first.give_back(&[granules(0, 2)]);
            let outcome = RecallOutcome {
                purged: 2 * GRANULE,
                ..RecallOutcome::default()
            };
            first.broker.answer_recall(id, &outcome).unwrap();
        });
        let receipt = rig.release(ReleaseTarget::Range(rig.range(0, 2)), 3000);
        assert_eq!(receipt.returned_purged, 2 * GRANULE);
    });
    // Another client was there for a moment; its lease ends by and by.
    rig.until(PATIENCE, |status| {
        status.clients.iter().map(|c| c.leased).sum::<u64>() == 6 * GRANULE
    });
    let again = rig.client();
    assert!(again.welcome.client_id > second.welcome.client_id);
    let listed: u64 = rig.listed().iter().map(|extent| extent.range.len).sum();
    assert_eq!(listed, 14 * GRANULE);
}

#[test]
fn what_the_device_did_not_take_yet_it_gets_from_the_next_broker() {
    let mut rig = Rig::new(&[8]);
    rig.model
        .inject(Fault::on(0x4803, FaultKind::ReturnCode(0x3)));
    let wanted = DpaRange {
        len: 4 * GRANULE,
        ..rig.model.memory_span()
    };
    let asks = ReleasePolicy::Prescriptive(vec![wanted]);
    rig.model.fabric().release(&asks, false).unwrap();
    rig.until(PATIENCE, |status| !status.receipts.is_empty());
    rig.restart(|_| ());
    rig.until(PATIENCE, |status| status.capacity.accepted == 4 * GRANULE);
}

#[test]
fn a_client_that_lies_about_its_leases_gets_none() {
    let mut rig = Rig::new(&[16]);
    let (mut liar, mut other) = (rig.client(), rig.client());
    let (mine, _) = liar.lease(4);
    let (theirs, _) = other.lease(4);
    rig.restart(|_| ());
    let refused = |error| {
        matches!(
            error,
            ConnectError::Refused {
                code: RefusedCode::Leases,
                ..
            }
        )
    };
    let free = granules(12, 1);
    for claim in [
        theirs[0],
        free,
        granules(1 << 40, 1),
        WindowRange { offset: 1, len: 2 },
    ] {
        let error = rejoin(&rig, &mut liar, &[mine[0], claim]).unwrap_err();
        assert!(refused(error), "{claim:?}: {error}");
    }
    // With somebody else's number, and with one that nobody has.
    for number in [other.welcome.client_id, 77, u64::MAX] {
        let page = &liar.welcome.page;
        let none = std::iter::empty();
        let rejoined = BrokerClient::rejoin(&rig.socket(), number, page, none);
        assert!(refused(rejoined.unwrap_err()));
    }
    let status = rig.status();
    assert_eq!(status.counters.refused, 7);
    assert_eq!(status.capacity.leased, 8 * GRANULE);
    rejoin(&rig, &mut other, &theirs).unwrap();
    rejoin(&rig, &mut liar, &mine).unwrap();
    assert_eq!(rig.status().counters.rejoined, 2);
}

#[test]
fn a_grant_or_return_that_was_lost_on_the_way_is_settled() {
    let mut rig = Rig::new(&[128]);
    let mut client = rig.client();
    let (ranges, _) = client.lease(128);
    // Every other granule: a list of several messages.
    let kept: Vec<WindowRange> = (0..64).map(|i| granules(2 * i, 1)).collect();
    assert_eq!(total(&ranges), 128 * GRANULE);
    rig.restart(|_| ());
    rejoin(&rig, &mut client, &kept).unwrap();
    rig.until(Duration::from_secs(5), |status| {
        status.capacity.clean == 64 * GRANULE && status.capacity.leased == 64 * GRANULE
    });
    let (again, _) = client.lease(64);
    assert_eq!(total(&again), 64 * GRANULE);
    assert!(again.iter().all(|range| !kept.contains(range)));
}

#[test]
fn who_ends_while_there_is_no_broker_gives_back_all() {
    let mut rig = Rig::new(&[8]);
    let (gone, stays) = (rig.client(), rig.client());
    gone.lease(4);
    stays.lease(2);
    rig.restart(|_| drop(gone));
    let status = rig.until(Duration::from_secs(5), |status| {
        status.capacity.leased == 2 * GRANULE
    });
    assert_eq!(status.clients.len(), 1);
    assert!(!status.clients[0].connected);
}

#[test]
fn what_is_taken_while_there_is_no_broker_is_told_afterwards() {
    let mut rig = Rig::new(&[8]);
    let mut client = rig.client();
    let (ranges, _) = client.lease(4);
    rig.restart(|model| {
        let taken = dax_backend::address::DpaRange {
            len: 2 * GRANULE,
            ..model.memory_span()
        };
        let fabric = model.fabric();
        let policy = ReleasePolicy::Prescriptive(vec![taken]);
        fabric.release(&policy, true).unwrap();
    });
    rejoin(&rig, &mut client, &ranges).unwrap();
    let (_, bytes, lost, is_lost) = client.next_recall();
    assert_eq!((bytes, is_lost), (2 * GRANULE, true));
    assert_eq!(lost.as_slice(), [granules(0, 2)]);
    let capacity = rig.status().capacity;
    assert_eq!((capacity.leased, capacity.lost), (2 * GRANULE, 2 * GRANULE));
}

#[test]
fn what_the_device_wanted_back_is_wanted_by_the_next_broker() {
    let mut rig = Rig::new(&[8]);
    let mut client = rig.client();
    let (ranges, _) = client.lease(4);
    let wanted = dax_backend::address::DpaRange {
        len: 4 * GRANULE,
        ..rig.model.memory_span()
    };
    let policy = ReleasePolicy::Prescriptive(vec![wanted]);
    rig.model.fabric().release(&policy, false).unwrap();
    assert!(matches!(client.next(), FromBroker::Recall { .. }));
    rig.restart(|_| ());
    rejoin(&rig, &mut client, &ranges).unwrap();
    assert_eq!(rig.status().capacity.outgoing, 4 * GRANULE);
    client.give_back(&ranges);
    rig.until(Duration::from_secs(5), |status| {
        status.capacity.accepted == 4 * GRANULE
    });
}

#[test]
fn numbers_of_clients_begin_anew_and_nobody_has_one_twice() {
    let mut rig = Rig::new(&[8]);
    let first = rig.client();
    assert_eq!(first.welcome.client_id, 1);
    // Beyond them are the numbers of families.
    let last = (1 << 31) - 1;
    rig.restart_numbering(last);
    let numbers = [(); 3].map(|()| rig.client()).map(|c| c.welcome.client_id);
    assert_eq!(numbers, [last, 2, 3]);
    // As an earlier broker may have left it.
    rig.restart_numbering(1 << 32);
    let next = rig.client().welcome.client_id;
    assert!((2..last).contains(&next), "{next}");
}
