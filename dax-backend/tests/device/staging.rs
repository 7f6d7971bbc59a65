//! Points 1 to 8: records become groups, and groups become capacity.

use dax_backend::address::Dpa;
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::error::DeviceError;
use dax_backend::event_record::{DYNAMIC_CAPACITY_RECORD, RawRecord};
use dax_backend::model::{Fault, FaultKind};
use dax_backend::staging::{Preparation, RejectReason};
use zerocopy::FromZeros;

use crate::bench::{
    any_device, choosing, on_qemu, only_on_the_model, opened, outcome, ranges, reasons,
};

#[test]
fn staging_01_record_with_more_is_only_staged() {
    only_on_the_model!("the records of a group come one by one");
    let (device, mut driver) = opened();
    let mut offer = device.offer_slowly(&[device.blocks(0, 1), device.blocks(4, 1)]);
    offer.write(1);
    assert_eq!(driver.poll().unwrap(), []);
    assert_eq!(driver.accepted(), []);
    assert_eq!(driver.counters().records, 1);
    let audit = device.model().audit();
    assert_eq!(audit.answers, []);
    assert_eq!(audit.records_in_log, 0, "a staged record is cleared");
}

#[test]
fn staging_02_record_without_more_closes_the_group() {
    only_on_the_model!("the records of a group come one by one");
    let (device, mut driver) = opened();
    let mut offer = device.offer_slowly(&[device.blocks(0, 1), device.blocks(4, 1)]);
    offer.write(1);
    driver.poll().unwrap();
    offer.write(1);
    let (accepted, _) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted, offer.extents());
    assert_eq!(device.model().audit().answers.len(), 1);
    assert_eq!(driver.poll().unwrap(), [], "and once only");
    device.assert_settled(&driver);
}

#[test]
fn staging_03_single_record_is_a_group() {
    let (device, mut driver) = opened();
    let offered = device.offer(&[device.blocks(7, 3)]);
    assert_eq!(
        driver.poll().unwrap(),
        [DeviceEvent::Accepted {
            extents: offered.clone()
        }]
    );
    assert_eq!(device.sent(0x4802), 1);
    device.assert_settled(&driver);
}

#[test]
fn staging_04_groups_are_answered_in_order_one_by_one() {
    let (device, mut driver) = opened();
    // The later the group, the lower its DPA: no order but that of the events will do.
    device.offer(&[device.blocks(40, 1), device.blocks(44, 1)]);
    device.offer(&[device.blocks(30, 1)]);
    device.offer(&[
        device.blocks(10, 1),
        device.blocks(14, 1),
        device.blocks(18, 1),
    ]);
    let events = driver.poll().unwrap();
    let sizes: Vec<usize> = events
        .iter()
        .map(|event| match event {
            DeviceEvent::Accepted { extents } => extents.len(),
            other => panic!("unexpected {other:?}"),
        })
        .collect();
    assert_eq!(sizes, [2, 1, 3]);
    assert_eq!(device.sent(0x4802), 3);
    device.assert_settled(&driver);
    if on_qemu() {
        return;
    }
    let answers = device.model().audit().answers;
    let answered: Vec<_> = answers
        .iter()
        .map(|answer| (answer.group, answer.ranges))
        .collect();
    assert_eq!(answered, [(Some(0), 2), (Some(1), 1), (Some(2), 3)]);
}

#[test]
fn staging_05_group_spans_reads_and_polls() {
    only_on_the_model!("the records of a group come one by one");
    let (device, mut driver) = opened();
    let mut offer = device.offer_slowly(&device.scattered(0, 50));
    // 2048 bytes of payload hold 15 records: each poll takes two reads, the group takes three.
    for _ in 0..2 {
        offer.write(20);
        assert_eq!(driver.poll().unwrap(), []);
    }
    assert_eq!(device.model().audit().answers, []);
    offer.write(10);
    let (accepted, _) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted, offer.extents());
    assert_eq!(device.model().audit().answers_to(0), 1);
    device.assert_settled(&driver);
}

#[test]
fn staging_06_other_records_neither_enter_nor_close_a_group() {
    only_on_the_model!("the device is asked for a forced release");
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(100, 2), device.blocks(110, 2)]);
    driver.poll().unwrap();
    let mut offer = device.offer_slowly(&[device.blocks(0, 1), device.blocks(4, 1)]);
    offer.write(1);
    device.ask_back(&[device.blocks(100, 2)]);
    device.take_away(&[device.blocks(110, 2)]);
    device.fabric().push_record(RawRecord {
        uuid: DYNAMIC_CAPACITY_RECORD,
        kind: 3,
        ..RawRecord::new_zeroed()
    });
    let events = driver.poll().unwrap();
    assert!(matches!(
        events[..],
        [
            DeviceEvent::ReleaseRequested { .. },
            DeviceEvent::ForcedRelease { .. },
            DeviceEvent::RegionsUpdated { region: 0 },
        ]
    ));
    offer.write(1);
    let (accepted, _) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted, offer.extents());
    assert_eq!(device.model().audit().answers_to(1), 1);
    device.assert_settled(&driver);
}

#[test]
fn staging_07_nothing_is_used_before_the_device_confirms() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    let offered = device.offer(&[device.blocks(0, 1)]);
    device
        .model()
        .inject(Fault::on(0x4802, FaultKind::ReturnCode(0x04)));
    assert!(matches!(driver.poll(), Err(DeviceError::Mailbox(_))));
    assert_eq!(driver.accepted(), [], "an error is no confirmation");
    // The device has consumed nothing, so the group is answered later.
    let (accepted, _) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted, offered);
    assert_eq!(device.model().audit().answers_to(0), 1);
    device.assert_settled(&driver);
}

#[test]
fn staging_08_failure_to_prepare_leaves_an_extent_out() {
    let device = any_device();
    let unusable = device.blocks(4, 1);
    let mut driver = device.open_with(choosing(move |extent| {
        if extent.range == unusable {
            Preparation::Refused
        } else {
            Preparation::Whole
        }
    }));
    device.offer(&[device.blocks(0, 1), unusable, device.blocks(8, 1)]);
    let events = driver.poll().unwrap();
    let (accepted, rejected) = outcome(&events);
    assert_eq!(
        ranges(&accepted),
        [device.blocks(0, 1), device.blocks(8, 1)]
    );
    assert_eq!(ranges(&rejected), [unusable]);
    assert_eq!(reasons(&events), [RejectReason::NotPrepared]);
    assert_eq!(device.sent(0x4802), 1);
    device.assert_settled(&driver);
}

#[test]
fn staging_08_failure_after_the_answer_is_released() {
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 1), device.blocks(4, 1)]);
    driver.poll().unwrap();
    driver.release(&[device.blocks(4, 1)]).unwrap();
    assert_eq!(ranges(driver.accepted()), [device.blocks(0, 1)]);
    assert_eq!(device.sent(0x4803), 1);
    assert_eq!(
        driver.accepted()[0].range.start,
        Dpa(device.blocks(0, 1).start.0)
    );
    device.assert_settled(&driver);
}
