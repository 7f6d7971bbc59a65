//! Points 28 to 32: tags and sharing.

use dax_backend::address::DpaRange;
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::extent::{Extent, ExtentTag};
use dax_backend::model::{AddPolicy, AddRequest, FabricError, ModelConfig, ModelRegion};
use dax_backend::staging::{Preparation, RejectReason};

use crate::bench::{
    BLOCK, Driver, MIB, TestDevice, choosing, only_on_the_model, opened, outcome, range, ranges,
    reasons, tag, test_device,
};

#[test]
fn tags_28_live_tag_is_not_offered_again() {
    only_on_the_model!("QEMU 10.0 drops the tag of an offer");
    let (device, mut driver) = opened();
    device.offer_tagged(&[device.blocks(0, 1)], tag(1));
    driver.poll().unwrap();
    device.offer_tagged(&[device.blocks(4, 1), device.blocks(8, 1)], tag(1));
    assert_eq!(reasons(&driver.poll().unwrap()), [RejectReason::TagLive; 2]);
    assert_eq!(ranges(driver.accepted()), [device.blocks(0, 1)]);
    // Once all of it has gone back, the tag is free.
    driver.release(&[device.blocks(0, 1)]).unwrap();
    let offered = device.offer_tagged(&[device.blocks(4, 1)], tag(1));
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    device.assert_settled(&driver);
}

#[test]
fn tags_28_bad_tag_rejects_its_own_extents_only() {
    only_on_the_model!("extents that no device should offer");
    let (device, mut driver) = opened();
    device.offer_tagged(&[device.blocks(0, 1)], tag(1));
    driver.poll().unwrap();
    let group = [(10, tag(1)), (12, tag(2)), (14, ExtentTag::NULL)].map(|(start, tag)| Extent {
        tag,
        ..Extent::untagged(device.blocks(start, 1))
    });
    device.fabric().add_unchecked(&group);
    let events = driver.poll().unwrap();
    assert_eq!(outcome(&events), (group[1..].to_vec(), group[..1].to_vec()));
    assert_eq!(reasons(&events), [RejectReason::TagLive]);
    device.assert_settled(&driver);
}

#[test]
fn tags_29_untagged_extents_are_independent() {
    let (device, mut driver) = opened();
    let first = device.offer(&[device.blocks(0, 1), device.blocks(4, 1)]);
    let second = device.offer(&[device.blocks(8, 1)]);
    assert_eq!(outcome(&driver.poll().unwrap()).0, [first, second].concat());
    device.ask_back(&[device.blocks(4, 1)]);
    let asked = driver.poll().unwrap();
    assert_eq!(
        asked,
        [DeviceEvent::ReleaseRequested {
            range: device.blocks(4, 1),
            tag: ExtentTag::NULL
        }]
    );
    driver.release(&[device.blocks(4, 1)]).unwrap();
    assert_eq!(
        ranges(driver.accepted()),
        [device.blocks(0, 1), device.blocks(8, 1)]
    );
    device.assert_settled(&driver);
}

/// Offers one extent of tag 9 for each sequence number, each a block above the one before.
fn offer_sequence(device: &TestDevice, sequence: &[u16]) -> Vec<Extent> {
    let extent = |(place, number): (usize, &u16)| Extent {
        range: device.blocks(2 * place as u64, 1),
        tag: tag(9),
        shared_seq: *number,
    };
    let extents: Vec<Extent> = sequence.iter().enumerate().map(extent).collect();
    device.fabric().add_unchecked(&extents);
    extents
}

#[test]
fn tags_30_sequence_is_all_zero_or_counts_from_zero() {
    only_on_the_model!("a look into the device");
    for sequence in [&[0, 0, 0][..], &[0], &[0, 1, 2], &[2, 0, 1]] {
        let (device, mut driver) = opened();
        let offered = offer_sequence(&device, sequence);
        let (mut expected, events) = (offered, driver.poll().unwrap());
        expected.sort_by_key(|extent| extent.shared_seq);
        assert_eq!(outcome(&events).0, expected, "in sequence: {sequence:?}");
        device.assert_settled(&driver);
    }
}

#[test]
fn tags_30_broken_sequence_is_rejected() {
    only_on_the_model!("a look into the device");
    for sequence in [
        &[1][..],
        &[0, 2],
        &[0, 1, 1],
        &[0, 0, 1],
        &[1, 2, 3],
        &[0, u16::MAX],
    ] {
        let (device, mut driver) = opened();
        offer_sequence(&device, sequence);
        let reasons = reasons(&driver.poll().unwrap());
        assert_eq!(
            reasons,
            vec![RejectReason::BadSequence; sequence.len()],
            "{sequence:?}"
        );
        assert_eq!(driver.accepted(), []);
        device.assert_settled(&driver);
    }
}

fn sharable() -> ModelConfig {
    let shared = ModelRegion {
        sharable: true,
        ..ModelRegion::of(256 * MIB)
    };
    ModelConfig {
        dc_regions: vec![ModelRegion::of(256 * MIB), shared],
        ..ModelConfig::default()
    }
}

fn shared(policy: AddPolicy) -> AddRequest {
    AddRequest {
        policy,
        region: 1,
        tag: tag(5),
    }
}

/// Another host has three extents under tag 5; this one comes to share them.
fn join(device: &TestDevice, driver: &mut Driver) -> (Vec<Extent>, Vec<DeviceEvent>) {
    let lens = AddPolicy::Contiguous(vec![BLOCK, 2 * BLOCK, BLOCK]);
    let extents = device.fabric().add_elsewhere(&shared(lens)).unwrap();
    let offered = device
        .fabric()
        .add(&shared(AddPolicy::EnableSharedAccess))
        .unwrap();
    assert_eq!(offered, extents);
    let sequence: Vec<u16> = extents.iter().map(|extent| extent.shared_seq).collect();
    assert_eq!(sequence, [0, 1, 2]);
    (extents, driver.poll().unwrap())
}

#[test]
fn tags_31_shared_tag_is_taken_whole() {
    only_on_the_model!("a look into the device");
    let device = test_device(sharable());
    let mut driver = device.open();
    let (extents, events) = join(&device, &mut driver);
    assert_eq!(outcome(&events).0, extents);
    device.assert_settled(&driver);
}

#[test]
fn tags_31_shared_tag_is_taken_whole_or_not_at_all() {
    only_on_the_model!("a look into the device");
    let device = test_device(sharable());
    let mut offers = 0;
    let mut driver = device.open_with(choosing(move |_| {
        offers += 1;
        if offers == 2 {
            Preparation::Refused
        } else {
            Preparation::Whole
        }
    }));
    let (_, events) = join(&device, &mut driver);
    assert_eq!(
        reasons(&events),
        [
            RejectReason::SharedTagIncomplete,
            RejectReason::NotPrepared,
            RejectReason::SharedTagIncomplete
        ]
    );
    assert_eq!(driver.accepted(), []);
    let answers = device.model().audit().answers;
    assert_eq!(
        (answers.len(), answers[0].ranges, answers[0].code),
        (1, 0, 0)
    );
    device.assert_settled(&driver);
}

#[test]
fn tags_31_sharing_needs_a_tag_that_somebody_has() {
    only_on_the_model!("a look into the device");
    let device = test_device(sharable());
    let none = device.fabric().add(&shared(AddPolicy::EnableSharedAccess));
    assert_eq!(none, Err(FabricError::NoSuchTag { tag: tag(5) }));
    let untagged = AddRequest {
        tag: ExtentTag::NULL,
        ..shared(AddPolicy::Free(vec![BLOCK]))
    };
    assert_eq!(
        device.fabric().add(&untagged),
        Err(FabricError::TagNeeded { region: 1 })
    );
}

#[test]
fn tags_32_tag_across_regions_is_rejected() {
    only_on_the_model!("extents that no device should offer");
    let device = test_device(ModelConfig {
        dc_regions: vec![ModelRegion::of(256 * MIB); 2],
        ..ModelConfig::default()
    });
    let mut driver = device.open();
    let other: DpaRange = range(device.fabric().region_base(1).unwrap().0, BLOCK);
    let tagged = |range| Extent {
        tag: tag(1),
        ..Extent::untagged(range)
    };
    device
        .fabric()
        .add_unchecked(&[tagged(device.blocks(0, 1)), tagged(other)]);
    assert_eq!(
        reasons(&driver.poll().unwrap()),
        [RejectReason::TagSpansRegions; 2]
    );
    // Untagged extents of one group may come from anywhere.
    device
        .fabric()
        .add_unchecked(&[device.blocks(0, 1), other].map(Extent::untagged));
    assert_eq!(outcome(&driver.poll().unwrap()).0.len(), 2);
    device.assert_settled(&driver);
}
