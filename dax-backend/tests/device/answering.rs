//! Points 9 to 13: what goes into an Add Dynamic Capacity Response, and when it is sent.
//! Point 14 is in `crashes.rs`.

use std::time::{Duration, Instant};

use dax_backend::address::DpaRange;
use dax_backend::capacity::CapacityDevice;
use dax_backend::error::DeviceError;
use dax_backend::mailbox::MailboxError;
use dax_backend::model::{Fault, FaultKind, ModelConfig};
use dax_backend::staging::{Preparation, RejectReason};

use crate::bench::{
    BLOCK, any_device, choosing, on_qemu, only_on_the_model, opened, outcome, ranges, reasons,
    test_device,
};

/// A group of three is answered by one command, and its extents can be used.
#[test]
fn answering_a_group_of_three_takes_one_command() {
    let (device, mut driver) = opened();
    let offered = device.offer(&[
        device.blocks(0, 4),
        device.blocks(8, 2),
        device.blocks(16, 1),
    ]);
    let (accepted, rejected) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted, offered);
    assert!(rejected.is_empty());
    assert_eq!(driver.accepted(), offered);
    assert_eq!(device.sent(0x4802), 1);
    device.assert_settled(&driver);
}

/// 200 extents come in many reads and are answered by one sequence within the payload.
#[test]
fn answering_a_group_of_200_keeps_to_the_payload() {
    only_on_the_model!("a group that is longer than its log");
    let (device, mut driver) = opened();
    device.offer(&device.scattered(0, 200));
    let (accepted, _) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted.len(), 200);
    let audit = device.model().audit();
    let answers: Vec<_> = audit
        .answers
        .iter()
        .map(|answer| (answer.group, answer.ranges, answer.more))
        .collect();
    assert_eq!(
        answers,
        [
            (Some(0), 85, true),
            (Some(0), 85, true),
            (Some(0), 30, false)
        ]
    );
    assert!(audit.count(0x0100) >= 200 / 15);
    device.assert_settled(&driver);
}

#[test]
fn answering_09_all_subset_part_or_none_take_one_command_each() {
    type Choice = fn(&DpaRange) -> Preparation;
    let all: Choice = |_| Preparation::Whole;
    let first_only: Choice = |range| {
        if range.start.0.is_multiple_of(8 * BLOCK) {
            Preparation::Whole
        } else {
            Preparation::Refused
        }
    };
    let middle: Choice = |range| {
        let start = dax_backend::address::Dpa(range.start.0 + BLOCK);
        Preparation::Part(DpaRange { start, len: BLOCK })
    };
    let none: Choice = |_| Preparation::Refused;
    for (choice, blocks) in [(all, 8), (first_only, 4), (middle, 2), (none, 0)] {
        let device = any_device();
        let mut driver = device.open_with(choosing(move |extent| choice(&extent.range)));
        device.offer(&[device.blocks(8, 4), device.blocks(20, 4)]);
        driver.poll().unwrap();
        let held: u64 = driver
            .accepted()
            .iter()
            .map(|extent| extent.range.len)
            .sum();
        assert_eq!(held, blocks * BLOCK);
        assert_eq!(device.sent(0x4802), 1);
        device.assert_settled(&driver);
    }
}

#[test]
fn answering_10_ranges_are_in_event_order_and_inside_what_was_offered() {
    let device = any_device();
    let wrong = device.blocks(9, 2);
    let mut driver = device.open_with(choosing(move |extent| {
        // A part that sticks out of its extent must never reach the device.
        if extent.range.intersects(&wrong) {
            Preparation::Part(wrong)
        } else {
            Preparation::Whole
        }
    }));
    let offered = [
        device.blocks(30, 1),
        device.blocks(20, 1),
        device.blocks(9, 1),
        device.blocks(2, 1),
    ];
    device.offer(&offered);
    let events = driver.poll().unwrap();
    assert_eq!(reasons(&events), [RejectReason::NotPrepared]);
    device.assert_settled(&driver);
    assert_eq!(
        ranges(driver.accepted()),
        [offered[3], offered[1], offered[0]]
    );
    if !on_qemu() {
        // The model lists what it accepted in the order of the answer.
        let listed = ranges(&device.model().audit().accepted);
        assert_eq!(listed, [offered[0], offered[1], offered[3]]);
    }
}

#[test]
fn answering_11_neighbours_are_merged_in_releases_only() {
    only_on_the_model!("a look into the device");
    let (device, mut driver) = opened();
    device.offer(&[
        device.blocks(0, 1),
        device.blocks(1, 1),
        device.blocks(2, 1),
    ]);
    driver.poll().unwrap();
    assert_eq!(device.model().audit().answers[0].ranges, 3);
    driver
        .release(&[
            device.blocks(1, 1),
            device.blocks(0, 1),
            device.blocks(2, 1),
        ])
        .unwrap();
    assert_eq!(device.model().audit().releases, [1]);
    device.assert_settled(&driver);
}

#[test]
fn answering_11_refused_continuation_keeps_what_is_listed() {
    only_on_the_model!("a group that is longer than its log");
    let device = test_device(ModelConfig {
        qemu_quirks: true,
        ..ModelConfig::default()
    });
    let mut driver = device.open();
    device.offer(&device.scattered(0, 100));
    let events = driver.poll().unwrap();
    let (accepted, rejected) = outcome(&events);
    assert_eq!((accepted.len(), rejected.len()), (85, 15));
    assert!(
        reasons(&events)
            .iter()
            .all(|reason| *reason == RejectReason::NotListed)
    );
    assert_eq!(driver.accepted().len(), 85);
    assert_eq!(driver.listed().unwrap(), driver.accepted());
    assert_eq!(device.model().audit().groups_pending, 0);
}

/// A device that knows no continued answers has taken the first command, and what becomes of the
/// second is not known at once: the answer is not sent again, and the next group keeps its own.
#[test]
fn answering_11_continuation_of_unknown_outcome_does_not_answer_the_next_group() {
    only_on_the_model!("the device goes wrong on order");
    for opcode in [0x4802, 0x4801] {
        let device = test_device(ModelConfig {
            qemu_quirks: true,
            ..ModelConfig::default()
        });
        let mut driver = device.open();
        device.offer(&device.scattered(0, 100));
        let next = device.offer(&[device.blocks(300, 1)]);
        if opcode == 0x4802 {
            // Busy from the second on, for longer than the driver tries.
            for after in [1, 0, 0, 0] {
                device.model().inject(Fault {
                    opcode: Some(opcode),
                    after,
                    kind: FaultKind::ReturnCode(0x05),
                });
            }
        } else {
            // The list that tells what was taken.
            device.model().inject(Fault::on(opcode, FaultKind::Hang));
        }
        assert!(driver.poll().is_err());
        device.model().clear_faults();
        device.model().reset();
        let (accepted, rejected) = outcome(&driver.poll().unwrap());
        assert_eq!((accepted.len(), rejected.len()), (86, 15), "{opcode:#x}");
        assert!(accepted.ends_with(&next));
        assert_eq!(driver.listed().unwrap(), driver.accepted());
        let audit = device.model().audit();
        assert_eq!((audit.groups_pending, audit.spurious_answers), (0, 0));
    }
}

#[test]
fn answering_12_nothing_is_answered_when_nothing_was_offered() {
    only_on_the_model!("the device is asked for a forced release");
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 2)]);
    driver.poll().unwrap();
    for _ in 0..3 {
        device.ask_back(&[device.blocks(0, 1)]);
        driver.poll().unwrap();
        driver.poll().unwrap();
    }
    device.take_away(&[device.blocks(0, 2)]);
    driver.poll().unwrap();
    assert_eq!(device.model().audit().count(0x4802), 1);
    device.assert_settled(&driver);
}

fn is_timeout(result: Result<impl Sized, DeviceError>) -> bool {
    matches!(
        result,
        Err(DeviceError::Mailbox(MailboxError::Timeout { .. }))
    )
}

#[test]
fn answering_12_answer_that_took_effect_unseen_is_not_repeated() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    let offered = device.offer(&[device.blocks(0, 1), device.blocks(4, 1)]);
    device
        .model()
        .inject(Fault::on(0x4802, FaultKind::HangExecuted));
    assert!(is_timeout(driver.poll()));
    assert_eq!(driver.accepted(), []);
    device.model().reset();
    let (accepted, _) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted, offered);
    assert_eq!(device.model().audit().count(0x4802), 1);
    device.assert_settled(&driver);
}

#[test]
fn answering_12_answer_that_was_lost_is_repeated() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    let offered = device.offer(&[device.blocks(0, 1)]);
    device.model().inject(Fault::on(0x4802, FaultKind::Hang));
    assert!(is_timeout(driver.poll()));
    device.model().reset();
    let (accepted, _) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted, offered);
    assert_eq!(device.model().audit().answers_to(0), 1);
    device.assert_settled(&driver);
}

#[test]
fn answering_12_late_answer_is_waited_for_and_not_repeated() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    let offered = device.offer(&[device.blocks(0, 1)]);
    let late = Duration::from_millis(60);
    device
        .model()
        .inject(Fault::on(0x4802, FaultKind::Delay(late)));
    assert!(is_timeout(driver.poll()));
    let (accepted, _) = outcome(&driver.poll().unwrap());
    assert_eq!(accepted, offered);
    assert_eq!(device.model().audit().count(0x4802), 1);
    device.assert_settled(&driver);
}

/// A rejection leaves no trace in the extent list, so it is never repeated; if it was lost, the
/// group is in the way of the next one, and goes then.
#[test]
fn answering_12_rejection_of_unknown_outcome_is_not_repeated() {
    only_on_the_model!("the device goes wrong on order");
    for fault in [FaultKind::HangExecuted, FaultKind::Hang] {
        let device = test_device(ModelConfig::default());
        let unwanted = device.blocks(0, 1);
        let mut driver = device.open_with(choosing(move |extent| {
            if extent.range == unwanted {
                Preparation::Refused
            } else {
                Preparation::Whole
            }
        }));
        device.offer(&[unwanted]);
        device.model().inject(Fault::on(0x4802, fault));
        assert!(is_timeout(driver.poll()));
        device.model().reset();
        driver.poll().unwrap();
        let offered = device.offer(&[device.blocks(4, 1)]);
        let (accepted, _) = outcome(&driver.poll().unwrap());
        assert_eq!(accepted, offered);
        let audit = device.model().audit();
        assert_eq!((audit.spurious_answers, audit.groups_pending), (0, 0));
        assert_eq!(audit.answers_to(0), 1);
        assert_eq!(audit.answers_to(1), 1);
    }
}

#[test]
fn answering_13_exhausted_device_is_asked_for_less() {
    only_on_the_model!("a group that is longer than its log");
    let device = test_device(ModelConfig {
        max_extents: 2,
        ..ModelConfig::default()
    });
    let mut driver = device.open();
    let offered = device.offer(&device.scattered(0, 3));
    let events = driver.poll().unwrap();
    assert_eq!(outcome(&events).0, offered[..2]);
    assert_eq!(reasons(&events), [RejectReason::DeviceExhausted]);
    assert_eq!(device.model().audit().answers_to(0), 1);
    device.assert_settled(&driver);
}

#[test]
fn answering_13_device_that_never_has_room_gets_a_rejection() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    device.offer(&device.scattered(0, 4));
    // Four, two and one are too many for a device that claims to have room.
    for _ in 0..3 {
        device
            .model()
            .inject(Fault::on(0x4802, FaultKind::ReturnCode(0x1d)));
    }
    let events = driver.poll().unwrap();
    assert_eq!(reasons(&events), [RejectReason::DeviceExhausted; 4]);
    let audit = device.model().audit();
    assert_eq!(audit.count(0x4802), 4);
    assert_eq!(audit.answers.last().unwrap().ranges, 0);
    device.assert_settled(&driver);
}

#[test]
fn answering_13_busy_device_is_asked_again() {
    only_on_the_model!("the device goes wrong on order");
    for code in [0x05, 0x06] {
        let (device, mut driver) = opened();
        let offered = device.offer(&[device.blocks(0, 1)]);
        for _ in 0..2 {
            device
                .model()
                .inject(Fault::on(0x4802, FaultKind::ReturnCode(code)));
        }
        let (accepted, _) = outcome(&driver.poll().unwrap());
        assert_eq!(accepted, offered);
        assert_eq!(driver.counters().retries, 2);
        device.assert_settled(&driver);
    }
}

#[test]
fn answering_13_refused_list_becomes_a_rejection() {
    only_on_the_model!("the device goes wrong on order");
    for code in [0x0f, 0x1e] {
        let (device, mut driver) = opened();
        device.offer(&[device.blocks(0, 1), device.blocks(4, 1)]);
        device
            .model()
            .inject(Fault::on(0x4802, FaultKind::ReturnCode(code)));
        let events = driver.poll().unwrap();
        assert_eq!(reasons(&events), [RejectReason::DeviceRefused { code }; 2]);
        assert_eq!(driver.accepted(), []);
        let audit = device.model().audit();
        assert_eq!(audit.answers_to(0), 1);
        assert_eq!(audit.answers.last().unwrap().ranges, 0);
        device.assert_settled(&driver);
    }
}

#[test]
fn answering_13_device_without_room_for_a_rejection_does_not_hang_us() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    device.offer(&device.scattered(0, 2));
    for _ in 0..20 {
        device
            .model()
            .inject(Fault::on(0x4802, FaultKind::ReturnCode(0x1d)));
    }
    assert!(driver.poll().is_err());
    assert_eq!(
        device.model().audit().count(0x4802),
        3,
        "two extents, one, none"
    );
}

/// A test build on a busy machine still has a wide margin; `examples/offer_latency.rs` measures.
#[test]
fn offer_of_three_extents_is_usable_within_five_milliseconds() {
    only_on_the_model!("a group that is longer than its log");
    let (device, mut driver) = opened();
    let mut times: Vec<Duration> = (0..101)
        .map(|round| {
            let started = Instant::now();
            device.offer(&device.scattered(6 * round % 400, 3));
            driver.poll().unwrap();
            let time = started.elapsed();
            let held = ranges(driver.accepted());
            assert_eq!(held.len(), 3);
            driver.release(&held).unwrap();
            time
        })
        .collect();
    times.sort_unstable();
    assert!(
        times[50] < Duration::from_millis(5),
        "p50 is {:?}",
        times[50]
    );
}
