//! Point 14: a driver may die between any two steps, and no group is answered twice or lost.

use std::time::Duration;

use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::mailbox::MailboxConfig;
use dax_backend::model::{AnswerAudit, Fault, FaultKind, ModelConfig};
use dax_backend::staging::Preparation;

use crate::bench::{Choose, Driver, TestDevice, only_on_the_model, sorted, test_device};
use crate::wire::{Crash, SharedJournal, tapped};

/// Blocks from here on are not wanted.
const UNWANTED: u64 = 400;

fn open(device: &TestDevice, journal: &SharedJournal, crash: &Crash) -> Option<Driver> {
    let unwanted = device.blocks(UNWANTED, 1).start;
    let config = DeviceConfig {
        mailbox: MailboxConfig {
            doorbell_timeout: Duration::from_millis(1),
            ..MailboxConfig::default()
        },
        ready_timeout: Duration::from_millis(1),
        prepare: Box::new(Choose(move |extent: &dax_backend::extent::Extent| {
            if extent.range.start >= unwanted {
                Preparation::Refused
            } else {
                Preparation::Whole
            }
        })),
        journal: Box::new(journal.with(crash.clone())),
        ..DeviceConfig::default()
    };
    DcDevice::open(tapped(device.mmio(), crash.clone()), config).ok()
}

/// One life of a driver; it may end at any step.
fn live(device: &TestDevice, journal: &SharedJournal, crash: &Crash) {
    let Some(mut driver) = open(device, journal, crash) else {
        return;
    };
    for _ in 0..3 {
        let _ = driver.poll();
    }
}

/// Groups to answer: an ordinary one, one rejected in part, one rejected whole, and one that
/// needs several reads and an answer of several commands.
fn offer(device: &TestDevice) {
    device.offer(&device.scattered(0, 3));
    device.offer(&[device.blocks(10, 1), device.blocks(UNWANTED, 1)]);
    device.offer(&[device.blocks(UNWANTED + 4, 1)]);
    device.offer(&device.scattered(20, 12));
}

fn small() -> ModelConfig {
    // 256 bytes of payload: one record in a read, ten ranges in an answer.
    ModelConfig {
        mailbox_payload: 256,
        ..ModelConfig::default()
    }
}

/// After all crashes: another group is offered, and everything has come to its end.
fn check(device: &TestDevice, journal: &SharedJournal, crashes: &str) {
    let mut driver = open(device, journal, &Crash::after(i64::MAX)).expect("a sound device opens");
    driver.poll().unwrap();
    device.offer(&[device.blocks(100, 1)]);
    driver.poll().unwrap();
    let audit = device.model().audit();
    assert_eq!(audit.spurious_answers, 0, "{crashes}");
    assert_eq!(audit.groups_pending, 0, "{crashes}");
    assert_eq!(audit.records_in_log, 0, "{crashes}");
    assert_eq!(sorted(&audit.accepted), driver.accepted(), "{crashes}");
    let mut wanted = device.scattered(0, 3);
    wanted.push(device.blocks(10, 1));
    wanted.extend(device.scattered(20, 12));
    wanted.push(device.blocks(100, 1));
    let held: Vec<_> = driver
        .accepted()
        .iter()
        .map(|extent| extent.range)
        .collect();
    assert_eq!(held, wanted, "{crashes}");
}

#[test]
fn answering_14_crash_at_any_step_answers_each_group_once() {
    only_on_the_model!("a look into the device");
    for steps in 0.. {
        let device = test_device(small());
        let journal = SharedJournal::new();
        offer(&device);
        let crash = Crash::after(steps);
        live(&device, &journal, &crash);
        check(&device, &journal, &format!("crash after {steps} steps"));
        if !crash.happened() {
            assert!(steps > 100, "only {steps} steps: the scenario is too short");
            return;
        }
    }
}

#[test]
fn answering_14_crash_of_the_next_driver_too_answers_each_group_once() {
    only_on_the_model!("a look into the device");
    for first in (0..).step_by(7) {
        let mut first_ends = false;
        for second in (0..).step_by(5) {
            let device = test_device(small());
            let journal = SharedJournal::new();
            offer(&device);
            let (crash, again) = (Crash::after(first), Crash::after(second));
            live(&device, &journal, &crash);
            live(&device, &journal, &again);
            check(
                &device,
                &journal,
                &format!("crashes after {first} and {second} steps"),
            );
            first_ends = !crash.happened();
            if !again.happened() {
                break;
            }
        }
        if first_ends {
            return;
        }
    }
}

/// An answer said to be out of order has the oldest group rejected, which here is the group
/// itself. A driver that dies over that must not have the next one reject it again.
#[test]
fn answering_14_crash_over_an_answer_out_of_order_rejects_nothing_twice() {
    only_on_the_model!("the device goes wrong on order");
    for steps in 0.. {
        let device = test_device(ModelConfig::default());
        let journal = SharedJournal::new();
        device.offer(&device.scattered(0, 2));
        device
            .model()
            .inject(Fault::on(0x4802, FaultKind::ReturnCode(0x02)));
        let crash = Crash::after(steps);
        live(&device, &journal, &crash);
        let mut driver = open(&device, &journal, &Crash::after(i64::MAX)).expect("it opens");
        for start in [20, 30] {
            device.offer(&[device.blocks(start, 1)]);
            driver.poll().unwrap();
        }
        let audit = device.model().audit();
        let rejects_nothing = |answer: &AnswerAudit| answer.group.is_none() && answer.ranges == 0;
        assert!(
            !audit.answers.iter().any(rejects_nothing),
            "crash after {steps} steps: {:#?}",
            audit.answers
        );
        assert_eq!(audit.groups_pending, 0, "crash after {steps} steps");
        if !crash.happened() {
            return;
        }
    }
}
