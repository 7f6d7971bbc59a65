//! Points 20 to 27: capacity going back.
//! Point 26 (no access after a release) is the user's of the memory, not the driver's.

use dax_backend::address::Dpa;
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::error::DeviceError;
use dax_backend::event_record::{DYNAMIC_CAPACITY_RECORD, RawRecord};
use dax_backend::extent::ExtentTag;
use dax_backend::mailbox::MailboxError;
use dax_backend::model::{Fault, FaultKind, ReleasePolicy};
use zerocopy::FromZeros;

use crate::bench::{BLOCK, only_on_the_model, opened, range, ranges, tag};

fn requests(events: &[DeviceEvent]) -> Vec<(dax_backend::address::DpaRange, ExtentTag)> {
    let requests = events.iter().filter_map(|event| match event {
        DeviceEvent::ReleaseRequested { range, tag } => Some((*range, *tag)),
        _ => None,
    });
    requests.collect()
}

#[test]
fn release_20_request_waits_until_the_host_is_done() {
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 4)]);
    driver.poll().unwrap();
    device.ask_back(&[device.blocks(0, 4)]);
    let asked = requests(&driver.poll().unwrap());
    assert_eq!(asked, [(device.blocks(0, 4), ExtentTag::NULL)]);
    for _ in 0..3 {
        assert_eq!(driver.poll().unwrap(), [], "the device does not ask again");
    }
    assert_eq!(device.sent(0x4803), 0, "the host still uses it");
    assert_eq!(driver.accepted().len(), 1);
    driver.release(&[device.blocks(0, 4)]).unwrap();
    assert_eq!(device.sent(0x4803), 1);
    assert_eq!(driver.counters().bytes_released, 4 * BLOCK);
    device.assert_settled(&driver);
}

#[test]
fn release_21_untagged_request_names_whole_blocks_of_what_is_held() {
    only_on_the_model!("a record of the test's own making");
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 4), device.blocks(4, 4)]);
    driver.poll().unwrap();
    device.ask_back(&[device.blocks(2, 4)]);
    let asked: Vec<_> = requests(&driver.poll().unwrap())
        .iter()
        .map(|request| request.0)
        .collect();
    assert_eq!(asked, [device.blocks(2, 2), device.blocks(4, 2)]);
    // A device that asks for half a block gets the whole one.
    let part = device.blocks(6, 1);
    device.fabric().push_record(RawRecord {
        uuid: DYNAMIC_CAPACITY_RECORD,
        kind: 1,
        start: (part.start.0 + 4096).into(),
        extent_len: BLOCK.into(),
        ..RawRecord::new_zeroed()
    });
    let asked = requests(&driver.poll().unwrap());
    assert_eq!(asked, [(device.blocks(6, 2), ExtentTag::NULL)]);
}

#[test]
fn release_21_tagged_request_names_the_whole_tag_group() {
    only_on_the_model!("a look into the device");
    let (device, mut driver) = opened();
    device.offer_tagged(&[device.blocks(0, 2), device.blocks(10, 2)], tag(1));
    device.offer_tagged(&[device.blocks(20, 2)], tag(2));
    driver.poll().unwrap();
    device.ask_back(&[device.blocks(1, 1)]);
    let whole = [
        (device.blocks(0, 2), tag(1)),
        (device.blocks(10, 2), tag(1)),
    ];
    assert_eq!(requests(&driver.poll().unwrap()), whole);
    // A record for each extent of the tag asks once, not once for each.
    device
        .fabric()
        .release(&ReleasePolicy::Tag(tag(1)), false)
        .unwrap();
    assert_eq!(requests(&driver.poll().unwrap()), whole);
    driver.release(&whole.map(|(range, _)| range)).unwrap();
    assert_eq!(ranges(driver.accepted()), [device.blocks(20, 2)]);
    device.assert_settled(&driver);
}

#[test]
fn release_22_request_for_what_is_not_held_is_ignored() {
    only_on_the_model!("a record of the test's own making");
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 4)]);
    driver.poll().unwrap();
    // The request and the host's own release cross each other.
    device.ask_back(&[device.blocks(0, 2)]);
    driver.release(&[device.blocks(0, 2)]).unwrap();
    assert_eq!(driver.poll().unwrap(), []);
    for (start, len) in [
        (0, BLOCK),
        (u64::MAX, u64::MAX),
        (device.blocks(0, 1).start.0, 0),
    ] {
        device.fabric().push_record(RawRecord {
            uuid: DYNAMIC_CAPACITY_RECORD,
            kind: 1,
            start: start.into(),
            extent_len: len.into(),
            ..RawRecord::new_zeroed()
        });
    }
    assert_eq!(driver.poll().unwrap(), []);
    assert_eq!(driver.counters().releases_not_held, 4);
    assert_eq!(device.model().audit().count(0x4803), 1);
    device.assert_settled(&driver);
}

#[test]
fn release_23_any_blocks_are_given_back_unasked() {
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 8), device.blocks(8, 8)]);
    driver.poll().unwrap();
    driver
        .release(&[device.blocks(1, 1), device.blocks(6, 4)])
        .unwrap();
    assert_eq!(
        ranges(driver.accepted()),
        [
            device.blocks(0, 1),
            device.blocks(2, 4),
            device.blocks(10, 6)
        ]
    );
    device.assert_settled(&driver);
}

#[test]
fn release_23_what_the_device_would_refuse_is_not_sent() {
    only_on_the_model!("a look into the device");
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 4)]);
    device.offer_tagged(&[device.blocks(10, 2), device.blocks(20, 2)], tag(1));
    driver.poll().unwrap();
    let held = driver.accepted().to_vec();
    let start = device.blocks(0, 1).start.0;
    let error = driver.release(&[range(start, BLOCK / 2)]).unwrap_err();
    assert!(matches!(error, DeviceError::Misaligned { .. }), "{error}");
    let error = driver.release(&[device.blocks(3, 2)]).unwrap_err();
    assert!(matches!(error, DeviceError::NotHeld { .. }), "{error}");
    let error = driver
        .release(&[range(u64::MAX - 1, u64::MAX)])
        .unwrap_err();
    assert!(matches!(error, DeviceError::NotHeld { .. }), "{error}");
    let error = driver.release(&[device.blocks(10, 2)]).unwrap_err();
    assert!(
        matches!(error, DeviceError::PartOfTagGroup { .. }),
        "{error}"
    );
    assert_eq!(driver.accepted(), held);
    assert_eq!(device.model().audit().count(0x4803), 0);
}

#[test]
fn release_23_many_ranges_take_several_commands() {
    only_on_the_model!("a group that is longer than its log");
    let (device, mut driver) = opened();
    let scattered = device.scattered(0, 100);
    device.offer(&scattered);
    driver.poll().unwrap();
    driver.release(&scattered).unwrap();
    assert_eq!(device.model().audit().releases, [85, 15]);
    assert_eq!(driver.accepted(), []);
    device.assert_settled(&driver);
}

#[test]
fn release_24_offered_capacity_is_never_released() {
    only_on_the_model!("the records of a group come one by one");
    let (device, mut driver) = opened();
    let mut offer = device.offer_slowly(&[device.blocks(0, 1), device.blocks(4, 1)]);
    offer.write(1);
    driver.poll().unwrap();
    let error = driver.release(&[device.blocks(0, 1)]).unwrap_err();
    assert!(matches!(error, DeviceError::NotHeld { .. }), "{error}");
    device.fabric().push_record(RawRecord {
        uuid: DYNAMIC_CAPACITY_RECORD,
        kind: 1,
        start: device.blocks(0, 1).start.0.into(),
        extent_len: BLOCK.into(),
        ..RawRecord::new_zeroed()
    });
    assert_eq!(driver.poll().unwrap(), []);
    assert_eq!(device.model().audit().count(0x4803), 0);
}

#[test]
fn release_25_forced_release_takes_effect_at_once_and_is_not_answered() {
    only_on_the_model!("the device is asked for a forced release");
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 4)]);
    device.offer_tagged(&[device.blocks(10, 1)], tag(3));
    driver.poll().unwrap();
    device.take_away(&[device.blocks(1, 2), device.blocks(10, 1)]);
    assert_eq!(
        driver.poll().unwrap(),
        [
            DeviceEvent::ForcedRelease {
                range: device.blocks(1, 2),
                tag: ExtentTag::NULL
            },
            DeviceEvent::ForcedRelease {
                range: device.blocks(10, 1),
                tag: tag(3)
            },
        ]
    );
    assert_eq!(
        ranges(driver.accepted()),
        [device.blocks(0, 1), device.blocks(3, 1)]
    );
    assert_eq!(driver.counters().bytes_forced, 3 * BLOCK);
    assert_eq!(device.model().audit().count(0x4803), 0);
    device.assert_settled(&driver);
}

#[test]
fn release_27_split_extents_match_the_device() {
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 16), device.blocks(32, 16)]);
    driver.poll().unwrap();
    // Pieces of one, two and three blocks, off the edges and out of the middle.
    for (start, len) in [(0, 1), (5, 2), (13, 3), (40, 1), (42, 3), (47, 1)] {
        driver.release(&[device.blocks(start, len)]).unwrap();
        assert_eq!(driver.listed().unwrap(), driver.accepted());
    }
    assert_eq!(
        ranges(driver.accepted()),
        [(1, 4), (7, 6), (32, 8), (41, 1), (45, 2)].map(|(start, len)| device.blocks(start, len))
    );
    device.assert_settled(&driver);
}

#[test]
fn release_27_release_of_unknown_outcome_is_looked_up() {
    only_on_the_model!("the device goes wrong on order");
    for (fault, released) in [(FaultKind::HangExecuted, true), (FaultKind::Hang, false)] {
        let (device, mut driver) = opened();
        device.offer(&[device.blocks(0, 4)]);
        driver.poll().unwrap();
        device.model().inject(Fault::on(0x4803, fault));
        let error = driver.release(&[device.blocks(1, 1)]).unwrap_err();
        assert!(
            matches!(error, DeviceError::Mailbox(MailboxError::Timeout { .. })),
            "{error}"
        );
        device.model().reset();
        driver.poll().unwrap();
        assert_eq!(driver.accepted().len() == 2, released);
        assert_eq!(
            driver.accepted()[0].range.start,
            Dpa(device.blocks(0, 1).start.0)
        );
        device.assert_settled(&driver);
    }
}

/// A forced release can be lost with the log, and nobody told: the device refuses what is gone.
#[test]
fn release_27_refused_release_is_looked_up() {
    only_on_the_model!("the device is asked for a forced release");
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 4)]);
    driver.poll().unwrap();
    device.take_away(&[device.blocks(1, 1)]);
    let error = driver.release(&[device.blocks(0, 2)]).unwrap_err();
    assert!(error.to_string().contains("(0x0f)"), "{error}");
    assert_eq!(
        ranges(driver.accepted()),
        [device.blocks(0, 1), device.blocks(2, 2)]
    );
    let (range, tag) = (device.blocks(1, 1), ExtentTag::NULL);
    assert_eq!(
        driver.poll().unwrap(),
        [DeviceEvent::ForcedRelease { range, tag }]
    );
    device.assert_settled(&driver);
}
