//! What a receipt says: every step of the chain, every reason, and what is
//! said before the end.

use std::thread;
use std::time::Duration;

use dax_backend::address::DpaRange;
use dax_backend::broker::admin::{AdminReply, AdminRequest, ReleaseTarget};
use dax_backend::broker::{
    GRANULE, RecallOutcome, Receipt, RefusalReason, StallTimes, WindowRange,
};
use dax_backend::extent::ExtentTag;
use dax_backend::model::{
    AddPolicy, AddRequest, ModelConfig, ModelRegion, ReleasePolicy, SoftwareDevice,
};

use crate::rig::{Rig, Setup};

fn request(granules: u64, deadline_ms: u64, past_deadline: bool) -> AdminRequest {
    AdminRequest::Release {
        target: ReleaseTarget::Bytes(granules * GRANULE),
        deadline_ms,
        force: false,
        past_deadline,
        progress: true,
    }
}

fn receipt(reply: AdminReply) -> Receipt {
    match reply {
        AdminReply::Receipt(receipt) => receipt,
        other => panic!("{other:?}"),
    }
}

fn granules(first: u64, count: u64) -> WindowRange {
    WindowRange {
        offset: first * GRANULE,
        len: count * GRANULE,
    }
}

#[test]
fn each_step_and_each_reason_has_its_line() {
    let rig = Rig::new(&[16]);
    let client = rig.client();
    client.lease(16);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (id, ..) = client.next_recall();
            client.give_back(&[granules(0, 10)]);
            for (reason, at, count) in [
                (RefusalReason::Pinned, 10, 1),
                (RefusalReason::DramLimit, 11, 2),
                (RefusalReason::Remapped, 13, 1),
            ] {
                let kept = [granules(at, count)];
                let said = client
                    .broker
                    .refuse_recall(id, reason, count * GRANULE, &kept);
                said.unwrap();
            }
            let outcome = RecallOutcome {
                idle: GRANULE,
                purged: 2 * GRANULE,
                dropped: GRANULE,
                to_extents: GRANULE,
                to_dram: 3 * GRANULE,
                spilled: 2 * GRANULE,
                copied: 5 * GRANULE,
                moving_us: 1000,
                stalls: StallTimes {
                    count: 7,
                    p50: 10,
                    p99: 20,
                    max: 30,
                },
                more: false,
            };
            client.broker.answer_recall(id, &outcome).unwrap();
        });
        let receipt = rig.release(ReleaseTarget::Bytes(14 * GRANULE), 5000);
        let steps = receipt.steps().map(|(_, bytes)| bytes / GRANULE);
        assert_eq!(steps, [0, 1, 2, 1, 1, 3, 2]);
        assert_eq!((receipt.copied, receipt.stalls.count), (5 * GRANULE, 7));
        assert_eq!(receipt.bandwidth(), Some(5 * GRANULE * 1000));
        let said: Vec<_> = receipt
            .refused
            .iter()
            .map(|refusal| (refusal.reason, refusal.len / GRANULE))
            .collect();
        let wanted = [
            (RefusalReason::Pinned, 1),
            (RefusalReason::DramLimit, 2),
            (RefusalReason::Remapped, 1),
        ];
        assert_eq!(said, wanted);
        assert_eq!(receipt.returned + receipt.refused_bytes(), receipt.asked);
    });
}

#[test]
fn of_a_range_each_part_has_the_reason_that_was_given_for_it() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    client.lease(8);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (id, ..) = client.next_recall();
            for (at, reason) in [(2, RefusalReason::Pinned), (3, RefusalReason::SpillFull)] {
                let kept = [granules(at, 1)];
                let said = client.broker.refuse_recall(id, reason, GRANULE, &kept);
                said.unwrap();
            }
            let outcome = RecallOutcome::default();
            client.broker.answer_recall(id, &outcome).unwrap();
        });
        let receipt = rig.release(ReleaseTarget::Range(rig.range(2, 2)), 5000);
        let said: Vec<_> = receipt
            .refused
            .iter()
            .map(|refusal| (refusal.dpa, refusal.reason))
            .collect();
        let wanted = [
            (Some(rig.range(2, 1).dpa), RefusalReason::Pinned),
            (Some(rig.range(3, 1).dpa), RefusalReason::SpillFull),
        ];
        assert_eq!(said, wanted);
    });
}

#[test]
fn every_reason_of_a_client_arrives_as_it_was_given() {
    let reasons = [
        RefusalReason::Live,
        RefusalReason::Pinned,
        RefusalReason::DramLimit,
        RefusalReason::Remapped,
        RefusalReason::CannotMove,
        RefusalReason::Deadline,
        RefusalReason::SpillFull,
        RefusalReason::SpillFailed,
        RefusalReason::Mappings,
    ];
    let rig = Rig::new(&[16]);
    let client = rig.client();
    client.lease(16);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (id, ..) = client.next_recall();
            for (at, reason) in (0..).zip(reasons) {
                let kept = [granules(at, 1)];
                let said = client.broker.refuse_recall(id, reason, GRANULE, &kept);
                said.unwrap();
            }
            let outcome = RecallOutcome::default();
            client.broker.answer_recall(id, &outcome).unwrap();
        });
        let whole = rig.range(0, reasons.len() as u64);
        let receipt = rig.release(ReleaseTarget::Range(whole), 5000);
        let said: Vec<_> = receipt
            .refused
            .iter()
            .map(|refusal| (refusal.dpa, refusal.len, refusal.reason))
            .collect();
        let wanted: Vec<_> = (0..)
            .zip(reasons)
            .map(|(at, reason)| (Some(rig.range(at, 1).dpa), GRANULE, reason))
            .collect();
        assert_eq!(said, wanted);
    });
}

#[test]
fn what_shares_a_device_block_with_memory_in_use_says_so() {
    const BLOCK: u64 = 4 * GRANULE;
    let region = ModelRegion {
        block_size: BLOCK,
        ..ModelRegion::of(512 << 20)
    };
    let config = ModelConfig {
        dc_regions: vec![region],
        ..ModelConfig::default()
    };
    let rig = Rig::over(
        SoftwareDevice::new(config).unwrap(),
        Setup {
            offer: &[8],
            ..Setup::default()
        },
    );
    let client = rig.client();
    let (leased, _) = client.lease(5);
    assert_eq!(
        leased.iter().map(|range| range.len).sum::<u64>(),
        5 * GRANULE
    );
    // Three of the second block's granules are free; the device takes whole blocks.
    let receipt = rig.release(ReleaseTarget::Range(rig.range(4, 4)), 200);
    assert_eq!(receipt.returned, 0);
    let said: Vec<_> = receipt
        .refused
        .iter()
        .map(|refusal| (refusal.dpa, refusal.len / GRANULE, refusal.reason))
        .collect();
    let wanted = [
        (Some(rig.range(4, 1).dpa), 1, RefusalReason::Deadline),
        (Some(rig.range(5, 3).dpa), 3, RefusalReason::BlockInUse),
    ];
    assert_eq!(said, wanted);
}

/// Blocks under 2 MiB: the end of an extent lies in no granule, and goes with the whole once.
#[test]
fn the_ends_of_an_extent_are_booked_once() {
    const MIB: u64 = 1 << 20;
    let region = ModelRegion {
        block_size: MIB,
        ..ModelRegion::of(512 << 20)
    };
    let config = ModelConfig {
        dc_regions: vec![region],
        ..ModelConfig::default()
    };
    let setup = Setup {
        offer: &[],
        ..Setup::default()
    };
    let rig = Rig::over(SoftwareDevice::new(config).unwrap(), setup);
    let extent = DpaRange {
        len: 5 * MIB,
        ..rig.model.memory_span()
    };
    let request = AddRequest {
        policy: AddPolicy::Prescriptive(vec![extent]),
        region: 0,
        tag: ExtentTag::NULL,
    };
    let fabric = rig.model.fabric();
    fabric.add(&request).unwrap();
    rig.until(Duration::from_secs(2), |status| {
        status.capacity.accepted == 5 * MIB
    });
    let asks = ReleasePolicy::Prescriptive(vec![extent]);
    fabric.release(&asks, false).unwrap();
    let status = rig.until(Duration::from_secs(2), |status| !status.receipts.is_empty());
    let receipt = &status.receipts[0];
    assert_eq!((receipt.asked, receipt.returned), (5 * MIB, 5 * MIB));
    assert_eq!(receipt.refused, []);
    assert_eq!(status.capacity.accepted, 0);
}

#[test]
fn at_the_deadline_there_is_a_receipt_and_the_work_goes_on() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    client.lease(8);
    let admin = rig.admin();
    thread::scope(|scope| {
        let partial = scope.spawn(|| {
            let mut heard = Vec::new();
            let patience = Duration::from_secs(10);
            let reply = admin.ask_watching(&request(6, 300, true), patience, |asked, back| {
                heard.push((asked / GRANULE, back / GRANULE));
            });
            (receipt(reply.unwrap()), heard)
        });
        let (id, ..) = client.next_recall();
        let answer = |first, count, more| {
            client.give_back(&[granules(first, count)]);
            let outcome = RecallOutcome {
                to_dram: count * GRANULE,
                more,
                ..RecallOutcome::default()
            };
            client.broker.answer_recall(id, &outcome).unwrap();
        };
        answer(0, 2, true);
        let (first, heard) = partial.join().unwrap();
        assert!(first.more);
        assert_eq!(first.returned_to_dram, 2 * GRANULE);
        assert_eq!(first.refused.len(), 1, "{first:?}");
        assert_eq!(first.refused[0].reason, RefusalReason::Deadline);
        assert_eq!(first.refused[0].len, 4 * GRANULE);
        assert_eq!(heard.last(), Some(&(6, 2)), "{heard:?}");
        assert_eq!(rig.status().receipts, []);

        answer(2, 4, false);
        let status = rig.until(Duration::from_secs(5), |s| !s.receipts.is_empty());
        let last = &status.receipts[0];
        assert!(!last.more && last.id == first.id);
        assert_eq!(last.returned_to_dram, 6 * GRANULE);
        assert_eq!(last.refused, []);
        assert_eq!(status.capacity.accepted, 2 * GRANULE);
    });
}

#[test]
fn what_outlives_its_deadline_gives_way_to_the_next() {
    let rig = Rig::with(Setup {
        offer: &[8],
        ..Setup::default()
    });
    let client = rig.client();
    client.lease(4);
    let first = receipt(rig.ask(&request(8, 100, true)).unwrap());
    assert!(first.more);
    assert_eq!(first.returned_free, 4 * GRANULE);
    // Nobody answers the first, and the second has nothing to find.
    let second = receipt(rig.ask(&request(1, 100, false)).unwrap());
    assert_eq!(second.returned, 0);
    let receipts = rig.status().receipts;
    assert_eq!(receipts.len(), 2);
    assert_eq!(receipts[0].refused[0].reason, RefusalReason::Deadline);
    assert!(!receipts[0].more);
}

#[test]
fn who_refuses_byte_by_byte_has_few_lines() {
    let rig = Rig::new(&[2]);
    let client = rig.client();
    client.lease(2);
    let receipt = thread::scope(|scope| {
        scope.spawn(|| {
            let (id, bytes, ..) = client.next_recall();
            let refuse = |bytes| {
                let said = client
                    .broker
                    .refuse_recall(id, RefusalReason::Pinned, bytes, &[]);
                said.unwrap();
            };
            (0..2000).for_each(|_| refuse(1));
            refuse(bytes - 2000);
            let outcome = RecallOutcome::default();
            client.broker.answer_recall(id, &outcome).unwrap();
        });
        rig.release(ReleaseTarget::Bytes(2 * GRANULE), 5000)
    });
    assert_eq!(receipt.refused_bytes(), 2 * GRANULE);
    assert!(receipt.refused.len() < 500, "{}", receipt.refused.len());
}
