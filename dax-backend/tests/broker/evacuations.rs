//! A process killed at any point of an evacuation: pool, leases and the
//! device's own list (4801h) agree afterwards.

use std::thread;
use std::time::Duration;

use dax_backend::broker::admin::ReleaseTarget;
use dax_backend::broker::{FromBroker, GRANULE, RecallOutcome, RefusalReason, WindowRange};

use crate::process::{Forked, lease_and_scribble};
use crate::rig::{PATIENCE, Rig, total};

const LEASED: u64 = 24;
const ROUNDS: u64 = 25;

/// What a heap does on a recall, granule by granule and slowly; allocates nothing.
fn evacuate(socket: &std::ffi::CStr) -> u8 {
    let Some((broker, welcome)) = lease_and_scribble(socket, LEASED) else {
        return 0;
    };
    while let Ok(Some(message)) = broker.recv(Some(PATIENCE)) {
        let FromBroker::Recall { id, bytes, .. } = message else {
            continue;
        };
        for granule in 0..bytes / GRANULE {
            let range = WindowRange {
                offset: granule * GRANULE,
                len: GRANULE,
            };
            if broker.return_ranges(&[range]).is_err() {
                return 0;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let _ = broker.refuse_recall(id, RefusalReason::Pinned, GRANULE, &[]);
        let outcome = RecallOutcome {
            to_dram: bytes,
            ..RecallOutcome::default()
        };
        let _ = broker.answer_recall(id, &outcome);
    }
    std::mem::forget((broker, welcome));
    1
}

#[test]
fn killed_at_any_point_it_leaves_the_books_right() {
    let mut during = 0;
    for round in 0..ROUNDS {
        let mut rig = Rig::new(&[32]);
        let socket = rig.socket();
        let child = Forked::run(|| evacuate(&socket));
        rig.until(PATIENCE, |status| {
            status.capacity.leased == LEASED * GRANULE
        });
        let receipt = thread::scope(|scope| {
            let killer = scope.spawn(|| {
                thread::sleep(Duration::from_micros(round * 3000));
                child.kill();
            });
            let receipt = rig.release(ReleaseTarget::Bytes(28 * GRANULE), 5000);
            killer.join().unwrap();
            receipt
        });
        assert_eq!(receipt.returned + receipt.refused_bytes(), receipt.asked);
        let status = rig.until(PATIENCE, |status| {
            status.capacity.leased == 0
                && status.capacity.outgoing == 0
                && status.clients.is_empty()
        });
        assert_eq!(
            status.capacity.accepted, status.capacity.free,
            "{receipt:?}"
        );
        assert_eq!(status.capacity.accepted, 32 * GRANULE - receipt.returned);
        // One that answered has said how.
        during += u64::from(receipt.returned_to_dram == 0);
        // All of it can be leased, once.
        let next = rig.client();
        let (granted, _) = next.lease(32);
        assert_eq!(total(&granted), status.capacity.accepted);
        let listed: u64 = rig.listed().iter().map(|extent| extent.range.len).sum();
        assert_eq!(listed, status.capacity.accepted, "{receipt:?}");
        assert_eq!(rig.model.audit().violations, Vec::<String>::new());
    }
    println!("{during} of {ROUNDS} were killed before they had answered");
    assert!(during > 0 && during < ROUNDS);
}
