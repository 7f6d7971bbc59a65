//! Memory asked back: by the operator, by the device, by force.

use std::thread;
use std::time::{Duration, Instant};

use dax_backend::broker::admin::{AdminReply, AdminRequest, ReleaseTarget};
use dax_backend::broker::receipt::{DpaSpan, HexDpa, Origin};
use dax_backend::broker::{GRANULE, RecallOutcome, RefusalReason, WindowRange};
use dax_backend::extent::ExtentTag;
use dax_backend::model::{AddPolicy, AddRequest, Fault, FaultKind, ReleasePolicy};
use dax_backend::orchestrator::Orchestrator;

use crate::process::{Forked, lease_and_scribble};
use crate::rig::{Client, Rig, Setup, is_zero, total};

const MIB: u64 = 1 << 20;

/// Says that so many granules were idle, were moved to DRAM, and are refused.
fn answer(client: &Client, id: u64, idle: u64, to_dram: u64, refused: u64, kept: &[WindowRange]) {
    if refused > 0 {
        let reason = RefusalReason::Pinned;
        let said = client
            .broker
            .refuse_recall(id, reason, refused * GRANULE, kept);
        said.unwrap();
    }
    let outcome = RecallOutcome {
        idle: idle * GRANULE,
        to_dram: to_dram * GRANULE,
        ..RecallOutcome::default()
    };
    client.broker.answer_recall(id, &outcome).unwrap();
}

fn listed_bytes(rig: &mut Rig) -> u64 {
    rig.listed().iter().map(|extent| extent.range.len).sum()
}

#[test]
fn free_capacity_goes_back_to_the_device_at_once() {
    let mut rig = Rig::new(&[32, 32]);
    let receipt = rig.release(ReleaseTarget::Bytes(48 * GRANULE), 1000);
    assert_eq!(receipt.returned_free, 48 * GRANULE);
    assert_eq!(receipt.refused, []);
    assert_eq!(receipt.origin, Origin::Operator);
    assert_eq!(rig.status().capacity.accepted, 16 * GRANULE);
    assert_eq!(rig.status().receipts, [receipt]);
    assert_eq!(listed_bytes(&mut rig), 16 * GRANULE);
    assert_eq!(rig.model.audit().violations, Vec::<String>::new());
}

#[test]
fn clients_return_what_is_not_free_and_say_how() {
    let mut rig = Rig::new(&[16]);
    let client = rig.client();
    let (ranges, _) = client.lease(12);
    let start = ranges[0].offset;
    let asked = thread::scope(|scope| {
        let script = scope.spawn(|| {
            let (id, bytes, only, lost) = client.next_recall();
            assert_eq!((only.as_slice(), lost), (&[][..], false));
            client.give_back(&[WindowRange {
                offset: start,
                len: 3 * GRANULE,
            }]);
            answer(&client, id, 2, 1, 1, &[]);
            bytes
        });
        let receipt = rig.release(ReleaseTarget::Bytes(8 * GRANULE), 2000);
        assert_eq!(receipt.asked, 8 * GRANULE);
        assert_eq!(receipt.returned_free, 4 * GRANULE);
        assert_eq!(receipt.returned_idle, 2 * GRANULE);
        assert_eq!(receipt.returned_to_dram, GRANULE);
        assert_eq!(receipt.refused.len(), 1);
        let refusal = &receipt.refused[0];
        assert_eq!(
            (refusal.len, refusal.reason),
            (GRANULE, RefusalReason::Pinned)
        );
        assert_eq!(refusal.pid, Some(std::process::id()));
        script.join().unwrap()
    });
    assert_eq!(asked, 4 * GRANULE);
    assert_eq!(listed_bytes(&mut rig), 9 * GRANULE);
}

#[test]
fn what_one_client_can_not_give_another_is_asked_for() {
    let rig = Rig::new(&[16]);
    let (stingy, generous) = (rig.client(), rig.client());
    stingy.lease(8);
    let (ranges, _) = generous.lease(8);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (id, bytes, ..) = stingy.next_recall();
            assert_eq!(bytes, 2 * GRANULE);
            answer(&stingy, id, 0, 0, 2, &[]);
        });
        scope.spawn(|| {
            for (first, count) in [(0, 2), (2, 2)] {
                let (id, bytes, ..) = generous.next_recall();
                assert_eq!(bytes, count * GRANULE);
                let offset = ranges[0].offset + first * GRANULE;
                generous.give_back(&[WindowRange { offset, len: bytes }]);
                answer(&generous, id, count, 0, 0, &[]);
            }
        });
        let receipt = rig.release(ReleaseTarget::Bytes(4 * GRANULE), 3000);
        assert_eq!(receipt.returned_idle, 4 * GRANULE);
        assert_eq!(receipt.refused, []);
    });
}

#[test]
fn who_does_not_answer_by_the_deadline_is_named() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    client.lease(8);
    let started = Instant::now();
    let receipt = rig.release(ReleaseTarget::Bytes(4 * GRANULE), 200);
    let took = started.elapsed();
    assert!((200..1500).contains(&took.as_millis()), "{took:?}");
    assert_eq!(receipt.returned, 0);
    assert_eq!(receipt.refused.len(), 1);
    assert_eq!(receipt.refused[0].reason, RefusalReason::Deadline);
    assert_eq!(receipt.refused[0].pid, Some(std::process::id()));
    assert_eq!(receipt.refused_bytes(), receipt.asked);
    // An answer that comes too late counts for nothing and harms nothing.
    let (id, ..) = client.next_recall();
    answer(&client, id, 4, 0, 0, &[]);
    assert_eq!(rig.status().capacity.leased, 8 * GRANULE);
}

#[test]
fn a_client_without_a_connection_is_named_at_once() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    client.lease(8);
    drop(client.broker);
    rig.until(Duration::from_secs(1), |status| {
        !status.clients[0].connected
    });
    let started = Instant::now();
    let receipt = rig.release(ReleaseTarget::Bytes(2 * GRANULE), 5000);
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(receipt.refused[0].reason, RefusalReason::Unreachable);
}

#[test]
fn a_range_is_asked_of_whoever_holds_it() {
    let rig = Rig::new(&[16]);
    let (first, second) = (rig.client(), rig.client());
    first.lease(4);
    second.lease(4);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (id, _, only, _) = second.next_recall();
            let wanted = [WindowRange {
                offset: 6 * GRANULE,
                len: 2 * GRANULE,
            }];
            assert_eq!(only.as_slice(), wanted);
            second.give_back(&[WindowRange {
                offset: 6 * GRANULE,
                len: GRANULE,
            }]);
            let kept = [WindowRange {
                offset: 7 * GRANULE,
                len: GRANULE,
            }];
            answer(&second, id, 1, 0, 1, &kept);
        });
        let range = rig.range(6, 4);
        let receipt = rig.release(ReleaseTarget::Range(range), 2000);
        assert_eq!(receipt.asked, 4 * GRANULE);
        assert_eq!(
            (receipt.returned_free, receipt.returned_idle),
            (2 * GRANULE, GRANULE)
        );
        let refusal = &receipt.refused[0];
        assert_eq!(refusal.dpa, Some(rig.range(7, 1).dpa));
        assert_eq!(
            (refusal.len, refusal.reason),
            (GRANULE, RefusalReason::Pinned)
        );
    });
    // The first client was not bothered, and what was refused is not marked for ever.
    assert_eq!(first.broker.recv(Some(Duration::ZERO)), Ok(None));
    let status = rig.status();
    assert_eq!(
        (status.capacity.outgoing, status.capacity.accepted),
        (0, 13 * GRANULE)
    );
}

#[test]
fn a_client_that_dies_during_a_recall_gives_what_it_had() {
    let rig = Rig::new(&[8]);
    let socket = rig.socket();
    let mut child = Forked::run(|| match lease_and_scribble(&socket, 8) {
        Some(kept) => {
            std::mem::forget(kept);
            1
        }
        None => 0,
    });
    assert_eq!(child.answer(), 1);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(100));
            child.kill();
        });
        let receipt = rig.release(ReleaseTarget::Bytes(8 * GRANULE), 3000);
        assert_eq!(receipt.returned, 8 * GRANULE, "{receipt:?}");
        assert!(receipt.duration_us < 1_500_000);
    });
}

#[test]
fn while_memory_is_asked_back_nobody_leases_it() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    let (ranges, _) = client.lease(8);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (id, ..) = client.next_recall();
            client.give_back(&ranges);
            // Three granules more than were asked for came free; two is what is left to lease.
            let (granted, exhausted) = client.lease(8);
            assert_eq!((total(&granted), exhausted), (2 * GRANULE, true));
            answer(&client, id, 6, 0, 0, &[]);
        });
        let receipt = rig.release(ReleaseTarget::Bytes(6 * GRANULE), 3000);
        assert_eq!(receipt.returned_idle, 6 * GRANULE);
    });
}

#[test]
fn the_devices_request_waits_for_what_is_in_use() {
    let mut rig = Rig::with(Setup {
        offer: &[8],
        recall_deadline: Duration::from_millis(150),
        ..Setup::default()
    });
    let client = rig.client();
    let (ranges, _) = client.lease(4);
    let all = rig.model.memory_span();
    let wanted = dax_backend::address::DpaRange {
        len: 8 * GRANULE,
        ..all
    };
    let fabric = rig.model.fabric();
    fabric
        .release(&ReleasePolicy::Prescriptive(vec![wanted]), false)
        .unwrap();
    let status = rig.until(Duration::from_secs(2), |status| !status.receipts.is_empty());
    let receipt = &status.receipts[0];
    assert_eq!(
        (receipt.origin, receipt.asked),
        (Origin::Device, 8 * GRANULE)
    );
    assert_eq!(receipt.returned_free, 4 * GRANULE);
    assert_eq!(receipt.refused[0].reason, RefusalReason::Deadline);
    // Still wanted: when it comes free, it goes without another word.
    assert_eq!(status.capacity.outgoing, 4 * GRANULE);
    client.give_back(&ranges);
    rig.until(Duration::from_secs(1), |status| {
        status.capacity.accepted == 0
    });
    assert_eq!(rig.listed(), []);
}

#[test]
fn a_forced_release_is_told_to_those_it_hit() {
    let rig = Rig::new(&[8]);
    let (hit, spared) = (rig.client(), rig.client());
    hit.lease(4);
    spared.lease(2);
    let span = rig.model.memory_span();
    let taken = dax_backend::address::DpaRange {
        len: 3 * GRANULE,
        ..span
    };
    rig.model
        .fabric()
        .release(&ReleasePolicy::Prescriptive(vec![taken]), true)
        .unwrap();
    let (_, bytes, ranges, lost) = hit.next_recall();
    assert!(lost);
    assert_eq!((bytes, ranges.bytes()), (3 * GRANULE, 3 * GRANULE));
    assert_eq!(spared.broker.recv(Some(Duration::ZERO)), Ok(None));
    let status = rig.status();
    let receipt = &status.receipts[0];
    assert_eq!((receipt.origin, receipt.returned), (Origin::Forced, 0));
    assert_eq!(receipt.refused[0].reason, RefusalReason::Lost);
    assert_eq!(
        (status.capacity.leased, status.capacity.lost),
        (3 * GRANULE, 3 * GRANULE)
    );
    // Returning what is gone already is no offence.
    hit.give_back(ranges.as_slice());
    assert_eq!(total(&hit.lease(1).0), GRANULE);
    let status = rig.status();
    assert_eq!((status.capacity.lost, status.counters.malformed), (0, 0));
}

/// A device may lend anew what it took by force, while whoever had it before
/// still maps it and writes there: nobody else may get it until that ends.
#[test]
fn what_was_taken_by_force_is_lent_again_only_when_its_holder_has_let_go() {
    let rig = Rig::new(&[8]);
    let holder = rig.client();
    holder.lease(4);
    let forced = AdminRequest::Release {
        target: ReleaseTarget::Range(rig.range(0, 4)),
        deadline_ms: 0,
        force: true,
        past_deadline: false,
        progress: false,
    };
    let AdminReply::Receipt(receipt) = rig.ask(&forced).unwrap() else {
        panic!("no receipt");
    };
    assert_eq!(receipt.origin, Origin::Forced);
    assert_eq!(receipt.refused[0].pid, Some(std::process::id()));
    let (_, _, lost, _) = holder.next_recall();
    let add = AdminRequest::Add {
        sizes: vec![4 * GRANULE],
        tag: None,
        shared: None,
    };
    rig.ask(&add).unwrap();
    let capacity = rig.status().capacity;
    assert_eq!(
        (capacity.accepted, capacity.free, capacity.lost),
        (8 * GRANULE, 4 * GRANULE, 4 * GRANULE)
    );
    assert_eq!(total(&rig.client().lease(8).0), 4 * GRANULE);
    holder.give_back(lost.as_slice());
    let next = rig.client();
    let (again, _) = next.lease(4);
    assert_eq!(again, lost.as_slice());
    assert!(is_zero(next.memory(), &again));
}

/// Both records are in the log when the device is polled: the extent list is as before, and its
/// bytes are somebody else's.
#[test]
fn what_was_taken_and_offered_again_at_once_is_lost_all_the_same() {
    let rig = Rig::new(&[8]);
    let holder = rig.client();
    let (held, _) = holder.lease(4);
    rig.until(Duration::from_secs(2), |status| {
        status.capacity.free == 4 * GRANULE
    });
    let taken = rig.model.memory_span();
    let taken = dax_backend::address::DpaRange {
        len: 6 * GRANULE,
        ..taken
    };
    let fabric = rig.model.fabric();
    rig.model.mute_event_status(true);
    fabric
        .release(&ReleasePolicy::Prescriptive(vec![taken]), true)
        .unwrap();
    let foreign = vec![0xa5; 6 * GRANULE as usize];
    rustix::io::pwrite(rig.model.memory(), &foreign, 0).unwrap();
    let request = AddRequest {
        policy: AddPolicy::Prescriptive(vec![taken]),
        region: 0,
        tag: ExtentTag::NULL,
    };
    fabric.add(&request).unwrap();
    rig.model.mute_event_status(false);

    let (_, bytes, lost, is_lost) = holder.next_recall();
    assert_eq!((bytes, is_lost), (4 * GRANULE, true));
    assert_eq!(lost.as_slice(), held);
    let capacity = rig.status().capacity;
    assert_eq!(
        (capacity.accepted, capacity.leased, capacity.lost),
        (8 * GRANULE, 0, 4 * GRANULE)
    );
    // What was free is not zero any more.
    let next = rig.client();
    let (granted, _) = next.lease(8);
    assert_eq!(total(&granted), 4 * GRANULE);
    assert!(is_zero(next.memory(), &granted));
}

#[test]
fn force_needs_a_range_and_somebody_to_use_it() {
    let rig = Rig::new(&[8]);
    let force = |target| {
        let order = AdminRequest::Release {
            target,
            deadline_ms: 0,
            force: true,
            past_deadline: false,
            progress: false,
        };
        rig.ask(&order).unwrap_err().to_string()
    };
    let error = force(ReleaseTarget::Bytes(GRANULE));
    assert!(error.contains("must be named"), "{error}");
    let error = force(ReleaseTarget::Range(rig.range(32, 1)));
    assert!(error.contains("the fabric refuses"), "{error}");
    assert_eq!(rig.status().capacity.accepted, 8 * GRANULE);
}

#[test]
fn a_tag_in_use_keeps_its_other_half() {
    let rig = Rig::new(&[]);
    let tag = ExtentTag([5; 16]);
    let mut fabric = rig.model.fabric();
    Orchestrator::add(&mut fabric, &[4 * GRANULE, 4 * GRANULE], tag).unwrap();
    rig.until(Duration::from_secs(2), |status| {
        status.capacity.accepted == 8 * GRANULE
    });
    let client = rig.client();
    client.lease_of(tag, 1);
    let free_half = rig.range(4, 4);
    let receipt = rig.release(ReleaseTarget::Range(free_half), 100);
    assert_eq!(receipt.returned, 0);
    assert_eq!(receipt.refused[0].reason, RefusalReason::TagInUse);
    // It was asked, did not answer, and may have the rest now.
    assert_eq!(client.next_recall().1, GRANULE);
    assert_eq!(total(&client.lease_of(tag, 7).0), 7 * GRANULE);
}

#[test]
fn what_the_device_does_not_take_stays_usable() {
    let rig = Rig::new(&[8]);
    rig.model
        .inject(Fault::on(0x4803, FaultKind::ReturnCode(0x3)));
    let receipt = rig.release(ReleaseTarget::Bytes(4 * GRANULE), 500);
    assert_eq!(receipt.returned, 0);
    assert_eq!(receipt.refused[0].reason, RefusalReason::Device);
    let detail = receipt.refused[0].detail.as_deref().unwrap_or_default();
    assert!(detail.contains("unsupported (0x03)"), "{detail}");
    let status = rig.status();
    assert!(status.device.last_error.is_some());
    assert_eq!(
        (status.capacity.accepted, status.capacity.outgoing),
        (8 * GRANULE, 0)
    );
    assert_eq!(total(&rig.client().lease(8).0), 8 * GRANULE);
}

fn granules_of(rig: &Rig, first: u64, count: u64) -> dax_backend::address::DpaRange {
    let span = rig.range(first, count);
    dax_backend::address::DpaRange {
        start: dax_backend::address::Dpa(span.dpa.0),
        len: span.len,
    }
}

#[test]
fn what_the_device_asked_for_and_did_not_take_it_gets_again_after_a_while() {
    let rig = Rig::new(&[8]);
    rig.model
        .inject(Fault::on(0x4803, FaultKind::ReturnCode(0x3)));
    let wanted = vec![granules_of(&rig, 0, 4)];
    let asks = ReleasePolicy::Prescriptive(wanted);
    rig.model.fabric().release(&asks, false).unwrap();
    let status = rig.until(Duration::from_secs(2), |status| !status.receipts.is_empty());
    assert_eq!(status.receipts[0].refused[0].reason, RefusalReason::Device);
    // Nobody gets it meanwhile.
    assert_eq!(status.capacity.outgoing, 4 * GRANULE);
    assert_eq!(total(&rig.client().lease(8).0), 4 * GRANULE);
    rig.until(Duration::from_secs(5), |status| {
        status.capacity.accepted == 4 * GRANULE
    });
    assert_eq!(rig.model.audit().count(0x4803), 2);
}

/// The device asks for an extent and takes half of it by force before it gets the rest: at once
/// when that is known by then, and in the second attempt when it is not.
#[test]
fn what_is_left_of_an_extent_taken_by_force_goes_where_it_was_to_go() {
    for known in [true, false] {
        let mut rig = Rig::new(&[8]);
        let client = rig.client();
        let (held, _) = client.lease(8);
        let release = |first, count, forced| {
            let policy = ReleasePolicy::Prescriptive(vec![granules_of(&rig, first, count)]);
            rig.model.fabric().release(&policy, forced).unwrap();
        };
        release(0, 8, false);
        let (id, ..) = client.next_recall();
        if known {
            // The order comes while the device is being polled.
            let slowly = FaultKind::Delay(Duration::from_millis(400));
            rig.model.inject(Fault::on(0x0100, slowly));
        } else {
            rig.model.mute_event_status(true);
        }
        release(0, 4, true);
        if known {
            thread::sleep(Duration::from_millis(100));
        }
        client.give_back(&held);
        answer(&client, id, 8, 0, 0, &[]);
        let status = rig.until(Duration::from_secs(5), |status| {
            status.capacity.accepted == 0 && status.receipts.len() == 2
        });
        if known {
            assert_eq!(status.device.last_error, None);
            let returned: u64 = status.receipts.iter().map(|r| r.returned).sum();
            assert_eq!(returned, 8 * GRANULE, "{:?}", status.receipts);
        }
        assert_eq!(rig.listed(), []);
    }
}

#[test]
fn more_than_there_is_is_refused_as_such() {
    let rig = Rig::new(&[4]);
    let receipt = rig.release(ReleaseTarget::Bytes(64 * MIB), 100);
    assert_eq!(receipt.returned, 8 * MIB);
    assert_eq!(receipt.refused.len(), 1);
    assert_eq!(receipt.refused[0].reason, RefusalReason::NotAccepted);
    assert_eq!(receipt.refused[0].len, 56 * MIB);
}

#[test]
fn ranges_that_make_no_sense_are_refused_before_anything_happens() {
    let rig = Rig::new(&[4]);
    let start = rig.range(0, 1).dpa.0;
    for (dpa, len, says) in [
        (start, 0, "empty"),
        (u64::MAX, 2 * GRANULE, "wraps"),
        (start + 4096, GRANULE, "whole blocks"),
        (start, 4096, "whole blocks"),
        (start - GRANULE, GRANULE, "not inside"),
    ] {
        let error = rig.ask(&AdminRequest::Release {
            target: ReleaseTarget::Range(DpaSpan {
                dpa: HexDpa(dpa),
                len,
            }),
            deadline_ms: 100,
            force: false,
            past_deadline: false,
            progress: false,
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains(says), "{dpa:#x}+{len:#x}: {error}");
    }
    assert_eq!(rig.status().capacity.accepted, 4 * GRANULE);
}

#[test]
fn without_time_only_what_is_free_goes_back() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    client.lease(6);
    for target in [
        ReleaseTarget::Bytes(4 * GRANULE),
        ReleaseTarget::Range(rig.range(0, 2)),
    ] {
        let receipt = rig.release(target, 0);
        assert_eq!(receipt.returned + receipt.refused_bytes(), receipt.asked);
        assert_eq!(receipt.refused[0].reason, RefusalReason::Deadline);
        assert_eq!(receipt.refused[0].pid, Some(std::process::id()));
    }
    // Nobody was bothered, nothing stays marked.
    assert_eq!(client.broker.recv(Some(Duration::ZERO)), Ok(None));
    let capacity = rig.status().capacity;
    assert_eq!((capacity.accepted, capacity.outgoing), (6 * GRANULE, 0));
}
