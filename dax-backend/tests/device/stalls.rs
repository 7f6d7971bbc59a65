//! Points 15 to 19: groups that do not end, do not fit, or make no sense.
//! Point 18 is in `tests/staging_oom.rs`, which needs an allocator of its own.

use std::thread::sleep;
use std::time::Duration;

use dax_backend::address::DpaRange;
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::extent::{Extent, ExtentTag};
use dax_backend::model::{Fault, FaultKind, ModelConfig, ModelRegion};
use dax_backend::staging::{RejectReason, StagingLimits};

use crate::bench::{
    BLOCK, Driver, MIB, TestDevice, any_device, config, on_qemu, only_on_the_model, opened,
    outcome, range, ranges, reasons, test_device,
};
use crate::wire::{Hook, tapped};

const TIMEOUT: Duration = Duration::from_millis(20);

/// A device whose event log holds 8 records.
fn shallow(qemu_quirks: bool, mailbox_payload: u32) -> TestDevice {
    test_device(ModelConfig {
        event_log_depth: 8,
        qemu_quirks,
        mailbox_payload,
        ..ModelConfig::default()
    })
}

fn impatient() -> DeviceConfig {
    let staging = StagingLimits {
        timeout: TIMEOUT,
        max_extents: 4,
    };
    DeviceConfig {
        staging,
        ..config()
    }
}

#[test]
fn stalls_15_group_without_end_is_rejected_once_and_its_tail_dropped() {
    only_on_the_model!("the records of a group come one by one");
    let device = test_device(ModelConfig::default());
    let mut driver = device.open_with(impatient());
    let mut offer = device.offer_slowly(&device.scattered(0, 3));
    offer.write(1);
    assert_eq!(driver.poll().unwrap(), []);
    sleep(TIMEOUT);
    assert_eq!(
        reasons(&driver.poll().unwrap()),
        [RejectReason::GroupTimedOut]
    );
    assert_eq!(driver.counters().group_timeouts, 1);
    let answers = device.model().audit().answers;
    assert_eq!((answers.len(), answers[0].ranges), (1, 0));
    // The rest of the chain comes after all, its end in another poll.
    offer.write(1);
    assert_eq!(driver.poll().unwrap(), []);
    offer.write(1);
    assert_eq!(driver.poll().unwrap(), []);
    assert_eq!(driver.counters().records_discarded, 2);
    assert_eq!(
        device.model().audit().answers.len(),
        1,
        "a late end is no group"
    );
    let offered = device.offer(&[device.blocks(20, 1)]);
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    device.assert_settled(&driver);
}

#[test]
fn stalls_15_each_record_starts_the_time_anew() {
    only_on_the_model!("the records of a group come one by one");
    let device = test_device(ModelConfig::default());
    let mut driver = device.open_with(impatient());
    let mut offer = device.offer_slowly(&device.scattered(0, 4));
    for _ in 0..4 {
        offer.write(1);
        driver.poll().unwrap();
        sleep(TIMEOUT / 2);
    }
    assert_eq!(driver.accepted().len(), 4);
    assert_eq!(driver.counters().group_timeouts, 0);
    device.assert_settled(&driver);
}

#[test]
fn stalls_15_end_that_waited_in_the_log_counts() {
    only_on_the_model!("the records of a group come one by one");
    let device = test_device(ModelConfig::default());
    let mut driver = device.open_with(impatient());
    let mut offer = device.offer_slowly(&device.scattered(0, 2));
    offer.write(1);
    driver.poll().unwrap();
    offer.write(1);
    sleep(TIMEOUT);
    assert_eq!(outcome(&driver.poll().unwrap()).0, offer.extents());
    device.assert_settled(&driver);
}

#[test]
fn stalls_16_overflow_ends_the_group_with_what_came() {
    // QEMU's log has room for 8 records too.
    let device = match on_qemu() {
        true => any_device(),
        false => shallow(false, 2048),
    };
    let mut driver = device.open();
    let first = device.offer(&device.scattered(0, 12));
    let events = driver.poll().unwrap();
    assert!(events.contains(&DeviceEvent::Overflow { lost: 4 }));
    assert_eq!(outcome(&events).0, first[..8]);
    assert_eq!(driver.counters().overflows, 1);
    assert_eq!(device.sent(0x4802), 1);
    let second = device.offer(&device.scattered(100, 2));
    assert_eq!(
        outcome(&driver.poll().unwrap()).0,
        second,
        "the next record starts a new group"
    );
    device.assert_settled(&driver);
}

/// The log is longer than one read, and a new offer comes as soon as there is room in it again.
#[test]
fn stalls_16_group_behind_the_loss_is_its_own_group() {
    only_on_the_model!("extents that no device should offer");
    let device = test_device(ModelConfig {
        event_log_depth: 20,
        ..ModelConfig::default()
    });
    let fabric = device.fabric().clone();
    let next: Vec<DpaRange> = device.scattered(100, 2);
    let mut offer_next = Some(next.clone());
    let wire = tapped(
        device.mmio(),
        Hook(move |opcode| {
            if opcode == 0x0101
                && let Some(ranges) = offer_next.take()
            {
                let extents: Vec<Extent> = ranges.into_iter().map(Extent::untagged).collect();
                fabric.add_unchecked(&extents);
            }
        }),
    );
    let mut driver = DcDevice::open(wire, config()).unwrap();
    let first = device.offer(&device.scattered(0, 22));
    let events = driver.poll().unwrap();
    let groups: Vec<&Vec<Extent>> = events
        .iter()
        .filter_map(|event| match event {
            DeviceEvent::Accepted { extents } => Some(extents),
            _ => None,
        })
        .collect();
    assert_eq!(groups.len(), 2);
    assert_eq!(groups[0][..], first[..20]);
    assert_eq!(ranges(groups[1]), next);
    device.assert_settled(&driver);
}

/// A group of which no record survived is pending all the same, and in the way of the next one.
#[test]
fn stalls_16_group_lost_whole_is_rejected_when_the_next_is_refused() {
    only_on_the_model!("a group that is longer than its log");
    for qemu_quirks in [false, true] {
        let device = shallow(qemu_quirks, 2048);
        let mut driver = device.open();
        device.offer(&device.scattered(0, 8));
        device.offer(&device.scattered(50, 2));
        driver.poll().unwrap();
        assert_eq!(
            device.model().audit().groups_pending,
            1,
            "nobody told the driver"
        );
        let third = device.offer(&device.scattered(100, 2));
        assert_eq!(outcome(&driver.poll().unwrap()).0, third);
        let audit = device.model().audit();
        assert_eq!((audit.groups_pending, audit.spurious_answers), (0, 0));
        assert_eq!([0, 1, 2].map(|group| audit.answers_to(group)), [1, 1, 1]);
        assert_eq!(driver.listed().unwrap(), driver.accepted());
    }
}

/// A rejection goes to whatever group is the oldest, which may be one that was lost whole.
#[test]
fn stalls_16_group_lost_whole_stays_expected_over_a_rejection() {
    only_on_the_model!("extents that no device should offer");
    let device = shallow(true, 2048);
    let mut driver = device.open();
    device.offer(&device.scattered(0, 8));
    device.offer(&device.scattered(50, 2));
    driver.poll().unwrap();
    device.fabric().add_unchecked(&[bad(0, BLOCK)]);
    assert_eq!(
        reasons(&driver.poll().unwrap()),
        [RejectReason::OutsideRegions]
    );
    let fourth = device.offer(&device.scattered(100, 2));
    assert_eq!(outcome(&driver.poll().unwrap()).0, fourth);
    let audit = device.model().audit();
    assert_eq!((audit.groups_pending, audit.spurious_answers), (0, 0));
}

/// Records can be lost between a read of the log and its being cleared, and then no count tells.
/// Offers the second of two groups in that moment and returns the driver.
fn lose_uncounted(device: &TestDevice) -> Driver {
    let (fabric, model) = (device.fabric().clone(), device.model().clone());
    let lost = device.scattered(50, 2);
    let mut offer_lost = Some(lost.into_iter().map(Extent::untagged).collect::<Vec<_>>());
    let hook = Hook(move |opcode| {
        if opcode == 0x0100
            && let Some(extents) = offer_lost.take_if(|_| model.audit().records_in_log == 8)
        {
            fabric.add_unchecked(&extents);
        }
    });
    let mut driver = DcDevice::open(tapped(device.mmio(), hook), config()).unwrap();
    device.offer(&device.scattered(0, 8));
    assert_eq!(outcome(&driver.poll().unwrap()).0.len(), 8);
    assert_eq!(driver.counters().overflows, 0);
    assert_eq!(device.model().audit().groups_pending, 1);
    driver
}

/// A device that says so when an answer is out of order is believed.
#[test]
fn stalls_16_group_lost_without_a_count_is_found_by_its_place() {
    only_on_the_model!("a group that is longer than its log");
    let device = shallow(false, 2048);
    let mut driver = lose_uncounted(&device);
    let third = device.offer(&device.scattered(100, 2));
    assert_eq!(outcome(&driver.poll().unwrap()).0, third);
    assert_eq!(device.model().audit().groups_pending, 0);
}

/// On a device that does not say so, the group behind it is rejected, and then all is well again.
#[test]
fn stalls_16_group_lost_without_a_count_costs_no_more_than_the_next() {
    only_on_the_model!("a group that is longer than its log");
    let device = shallow(true, 2048);
    let mut driver = lose_uncounted(&device);
    device.offer(&device.scattered(100, 2));
    let code = 0x0f;
    let refused = [RejectReason::DeviceRefused { code }; 2];
    assert_eq!(reasons(&driver.poll().unwrap()), refused);
    let fourth = device.offer(&device.scattered(110, 2));
    assert_eq!(outcome(&driver.poll().unwrap()).0, fourth);
    let audit = device.model().audit();
    assert_eq!((audit.groups_pending, audit.spurious_answers), (0, 0));
}

/// The count grows for as long as the log is not cleared.
#[test]
fn stalls_16_losses_after_a_refused_clear_are_counted() {
    only_on_the_model!("the device goes wrong on order");
    // All of the log in one read, and three records in one.
    for payload in [2048, 512] {
        let device = shallow(true, payload);
        let mut driver = device.open();
        device.offer(&device.scattered(0, 8));
        device.offer(&[device.blocks(50, 1)]);
        device
            .model()
            .inject(Fault::on(0x0101, FaultKind::ReturnCode(0x04)));
        assert!(driver.poll().is_err());
        device.offer(&[device.blocks(60, 1)]);
        driver.poll().unwrap();
        let fourth = device.offer(&device.scattered(100, 2));
        assert_eq!(outcome(&driver.poll().unwrap()).0, fourth);
        let audit = device.model().audit();
        assert_eq!((audit.groups_pending, audit.spurious_answers), (0, 0));
    }
}

/// A lost record need not be the end of the open group, which may come later. It is answered as
/// the group that it seems to be, refused, and then left alone: a rejection would be one too many.
#[test]
fn stalls_16_late_end_of_a_truncated_group_is_not_rejected() {
    only_on_the_model!("the records of a group come one by one");
    let device = shallow(false, 2048);
    let mut driver = device.open();
    device.offer(&[device.blocks(100, 1)]);
    driver.poll().unwrap();
    device.offer(&device.scattered(0, 7));
    let mut offer = device.offer_slowly(&device.scattered(50, 2));
    offer.write(1);
    device.ask_back(&[device.blocks(100, 1)]);
    let events = driver.poll().unwrap();
    assert!(events.contains(&DeviceEvent::Overflow { lost: 1 }));
    offer.write(1);
    let events = driver.poll().unwrap();
    let code = 0x0f;
    assert_eq!(reasons(&events), [RejectReason::DeviceRefused { code }]);
    let answers = device.model().audit().answers;
    assert!(
        answers.iter().all(|answer| answer.ranges > 0),
        "{answers:?}"
    );
    let offered = device.offer(&[device.blocks(200, 1)]);
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    assert_eq!(driver.listed().unwrap(), driver.accepted());
}

/// What the lost records told is found out in other ways.
#[test]
fn stalls_16_forced_release_and_region_update_are_noticed_without_their_records() {
    only_on_the_model!("the device is asked for a forced release");
    let device = test_device(ModelConfig {
        event_log_depth: 8,
        dc_regions: vec![ModelRegion::of(256 * MIB); 2],
        ..ModelConfig::default()
    });
    let mut driver = device.open();
    device.offer(&[device.blocks(100, 4)]);
    driver.poll().unwrap();
    device.offer(&device.scattered(0, 8));
    device.take_away(&[device.blocks(101, 2)]);
    device.fabric().update_region(1, 4 * MIB).unwrap();
    let events = driver.poll().unwrap();
    assert!(events.contains(&DeviceEvent::Overflow { lost: 2 }));
    assert!(events.contains(&DeviceEvent::RegionsUpdated { region: 1 }));
    let (range, tag) = (device.blocks(101, 2), ExtentTag::NULL);
    assert!(events.contains(&DeviceEvent::ForcedRelease { range, tag }));
    assert_eq!(driver.block_size(), 4 * MIB);
    assert_eq!(driver.counters().bytes_forced, 2 * BLOCK);
    device.assert_settled(&driver);
}

#[test]
fn stalls_17_oversized_group_is_rejected_once_and_its_tail_dropped() {
    only_on_the_model!("a group that is longer than its log");
    let device = test_device(ModelConfig::default());
    let mut driver = device.open_with(impatient());
    device.offer(&device.scattered(0, 7));
    let events = driver.poll().unwrap();
    assert_eq!(reasons(&events), [RejectReason::GroupTooLarge; 4]);
    let answers = device.model().audit().answers;
    assert_eq!((answers.len(), answers[0].ranges), (1, 0));
    assert_eq!(driver.counters().groups_too_large, 1);
    let offered = device.offer(&device.scattered(50, 4));
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    device.assert_settled(&driver);
}

/// One malformed extent between two good ones.
fn rejects_only(bad: Extent, reason: RejectReason) {
    let device = test_device(ModelConfig {
        dc_regions: vec![ModelRegion::of(512 * MIB), ModelRegion::of(256 * MIB)],
        ..ModelConfig::default()
    });
    let mut driver = device.open();
    device.offer(&[device.blocks(30, 4)]);
    driver.poll().unwrap();
    let good = [device.blocks(0, 4), device.blocks(10, 2)].map(Extent::untagged);
    device.fabric().add_unchecked(&[good[0], bad, good[1]]);
    let events = driver.poll().unwrap();
    assert_eq!(outcome(&events).0, good, "{reason:?}");
    assert_eq!(reasons(&events), [reason]);
    assert_eq!(outcome(&events).1, [bad]);
    assert_eq!(device.model().audit().answers_to(1), 1, "in one answer");
    assert_eq!(driver.accepted().len(), 3);
    device.assert_settled(&driver);
}

const BASE: u64 = 512 * MIB;

fn bad(start: u64, len: u64) -> Extent {
    Extent::untagged(range(start, len))
}

#[test]
fn stalls_19_extent_outside_regions_is_rejected_alone() {
    only_on_the_model!("a look into the device");
    rejects_only(bad(0, BLOCK), RejectReason::OutsideRegions);
    rejects_only(bad(BASE + (1 << 40), BLOCK), RejectReason::OutsideRegions);
}

#[test]
fn stalls_19_extent_across_two_regions_is_rejected_alone() {
    only_on_the_model!("a look into the device");
    rejects_only(bad(BASE + 510 * MIB, 4 * MIB), RejectReason::OutsideRegions);
}

#[test]
fn stalls_19_empty_extent_is_rejected_alone() {
    only_on_the_model!("a look into the device");
    rejects_only(bad(BASE + 8 * BLOCK, 0), RejectReason::Empty);
}

#[test]
fn stalls_19_misaligned_extent_is_rejected_alone() {
    only_on_the_model!("a look into the device");
    let reason = RejectReason::Misaligned { block_size: BLOCK };
    rejects_only(bad(BASE + 8 * BLOCK + 4096, BLOCK), reason);
    rejects_only(bad(BASE + 8 * BLOCK, BLOCK - 64), reason);
}

#[test]
fn stalls_19_wrapping_extent_is_rejected_alone() {
    only_on_the_model!("a look into the device");
    rejects_only(bad(BASE, u64::MAX), RejectReason::Wraps);
    rejects_only(bad(u64::MAX - BLOCK + 1, BLOCK), RejectReason::Wraps);
}

#[test]
fn stalls_19_extent_over_a_held_one_is_rejected_alone() {
    only_on_the_model!("a look into the device");
    rejects_only(
        bad(BASE + 31 * BLOCK, BLOCK),
        RejectReason::OverlapsAccepted,
    );
    rejects_only(
        bad(BASE + 28 * BLOCK, 8 * BLOCK),
        RejectReason::OverlapsAccepted,
    );
}

#[test]
fn stalls_19_extent_over_another_of_its_group_is_rejected_alone() {
    only_on_the_model!("a look into the device");
    rejects_only(
        bad(BASE + 3 * BLOCK, 2 * BLOCK),
        RejectReason::OverlapsGroup,
    );
    rejects_only(bad(BASE, BLOCK), RejectReason::OverlapsGroup);
}

#[test]
fn stalls_19_group_of_nothing_but_nonsense_is_rejected() {
    only_on_the_model!("extents that no device should offer");
    let (device, mut driver) = opened();
    device
        .fabric()
        .add_unchecked(&[bad(0, 0), bad(u64::MAX, u64::MAX)]);
    assert_eq!(driver.poll().unwrap().len(), 1);
    assert_eq!(device.model().audit().answers_to(0), 1);
    device.assert_settled(&driver);
}
