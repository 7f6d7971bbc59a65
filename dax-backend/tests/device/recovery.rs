//! Points 33 to 39: starting over, missed signals, one mailbox, memory as it comes.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use dax_backend::address::{DpaRange, Hpa, HpaWindow};
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::error::DeviceError;
use dax_backend::extent::Extent;
use dax_backend::model::{Fault, FaultKind, ModelConfig, ModelRegion};
use rustix::fs::fstat;
use rustix::io::{pread, pwrite};

use crate::bench::{
    BLOCK, MIB, TestDevice, any_device, config, only_on_the_model, opened, outcome, ranges,
    test_device,
};
use crate::wire::{Hook, SharedJournal, tapped};

#[test]
fn recovery_33_accepted_extents_are_adopted_without_an_answer() {
    only_on_the_model!("a group that is longer than its log");
    let (device, mut driver) = opened();
    device.offer(&device.scattered(0, 120));
    driver.poll().unwrap();
    let held = driver.accepted().to_vec();
    drop(driver);
    let answers = device.model().audit().answers.len();
    let mut driver = device.open();
    assert_eq!(driver.accepted(), held, "120 extents take three pages");
    assert_eq!(driver.counters().extents_adopted, 120);
    assert_eq!(driver.poll().unwrap(), []);
    assert_eq!(device.model().audit().answers.len(), answers);
    driver.release(&ranges(&held)).unwrap();
    device.assert_settled(&driver);
}

#[test]
fn recovery_33_offers_waiting_in_the_log_are_answered_at_start() {
    let device = any_device();
    let offered = device.offer(&[device.blocks(0, 1), device.blocks(4, 1)]);
    let mut driver = device.open();
    assert_eq!(driver.accepted(), offered);
    assert_eq!(driver.poll().unwrap(), [], "accepted() has told it already");
    assert_eq!(device.sent(0x4802), 1);
    device.assert_settled(&driver);
}

/// A driver that answers first and clears then may die in between.
#[test]
fn recovery_33_answered_group_left_in_the_log_is_not_answered_again() {
    only_on_the_model!("a record of the test's own making");
    let (device, mut driver) = opened();
    let offered = device.offer(&[device.blocks(0, 1)]);
    driver.poll().unwrap();
    drop(driver);
    let extent = offered[0];
    device
        .fabric()
        .push_record(dax_backend::event_record::RawRecord {
            uuid: dax_backend::event_record::DYNAMIC_CAPACITY_RECORD,
            start: extent.range.start.0.into(),
            extent_len: extent.range.len.into(),
            ..zerocopy::FromZeros::new_zeroed()
        });
    let driver = device.open();
    assert_eq!(driver.accepted(), offered);
    assert_eq!(device.model().audit().count(0x4802), 1);
    device.assert_settled(&driver);
}

#[test]
fn recovery_33_list_that_changes_between_pages_is_read_again() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    device.offer(&device.scattered(0, 120));
    driver.poll().unwrap();
    let held = driver.accepted().to_vec();
    let before = device.model().audit().count(0x4801);
    device
        .model()
        .inject(Fault::on(0x4801, FaultKind::GenerationChange));
    assert_eq!(driver.listed().unwrap(), held);
    assert_eq!(
        device.model().audit().count(0x4801) - before,
        2 + 3,
        "two pages for nothing"
    );
    for _ in 0..10 {
        device.model().inject(Fault {
            after: 0,
            ..Fault::on(0x4801, FaultKind::GenerationChange)
        });
        device.model().inject(Fault {
            after: 1,
            ..Fault::on(0x4801, FaultKind::GenerationChange)
        });
    }
    let error = driver.listed().unwrap_err();
    assert!(
        matches!(error, DeviceError::ExtentListUnstable { attempts: 10 }),
        "{error}"
    );
}

fn journaled(journal: &SharedJournal) -> DeviceConfig {
    DeviceConfig {
        journal: Box::new(journal.clone()),
        ..config()
    }
}

#[test]
fn recovery_34_group_cleared_in_part_survives_its_driver() {
    only_on_the_model!("the records of a group come one by one");
    let device = test_device(ModelConfig::default());
    let journal = SharedJournal::new();
    let mut driver = device.open_with(journaled(&journal));
    let mut offer = device.offer_slowly(&device.scattered(0, 3));
    offer.write(2);
    driver.poll().unwrap();
    assert_eq!(
        device.model().audit().records_in_log,
        0,
        "the only record of it is the journal"
    );
    drop(driver);
    let mut driver = device.open_with(journaled(&journal));
    assert_eq!(driver.poll().unwrap(), []);
    offer.write(1);
    assert_eq!(outcome(&driver.poll().unwrap()).0, offer.extents());
    assert_eq!(device.model().audit().answers_to(0), 1);
    device.assert_settled(&driver);
}

#[test]
fn recovery_34_answer_that_was_given_is_struck_out() {
    only_on_the_model!("a device made for the test");
    let device = test_device(ModelConfig::default());
    let journal = SharedJournal::new();
    let mut driver = device.open_with(journaled(&journal));
    device.offer(&[device.blocks(0, 1)]);
    driver.poll().unwrap();
    // Given back, it looks like an answer that never came.
    driver.release(&[device.blocks(0, 1)]).unwrap();
    drop(driver);
    let driver = device.open_with(journaled(&journal));
    assert_eq!(driver.accepted(), []);
    assert_eq!(device.model().audit().count(0x4802), 1);
    device.assert_settled(&driver);
}

#[test]
fn recovery_34_group_that_cannot_be_written_down_stays_in_the_log() {
    only_on_the_model!("a device made for the test");
    let device = test_device(ModelConfig::default());
    let journal = SharedJournal::new();
    // Opening writes the journal once; from then on it cannot be written.
    let broken = journal.with(crate::wire::Crash::after(1));
    let mut driver = device.open_with(journaled(&broken));
    let offered = device.offer(&[device.blocks(0, 1)]);
    for _ in 0..3 {
        let error = driver.poll().unwrap_err();
        assert!(matches!(error, DeviceError::Journal(_)), "{error}");
    }
    let audit = device.model().audit();
    assert_eq!((audit.records_in_log, audit.answers.len()), (1, 0));
    drop(driver);
    let driver = device.open_with(journaled(&journal));
    assert_eq!(driver.accepted(), offered);
    device.assert_settled(&driver);
}

#[test]
fn recovery_35_region_update_is_read_again() {
    only_on_the_model!("extents that no device should offer");
    let (device, mut driver) = opened();
    assert_eq!(driver.block_size(), 2 * MIB);
    device.fabric().update_region(0, 4 * MIB).unwrap();
    assert_eq!(
        driver.poll().unwrap(),
        [DeviceEvent::RegionsUpdated { region: 0 }]
    );
    assert_eq!(driver.block_size(), 4 * MIB);
    // The new block size rules at once.
    device
        .fabric()
        .add_unchecked(&[Extent::untagged(device.blocks(1, 2))]);
    let (accepted, rejected) = outcome(&driver.poll().unwrap());
    assert_eq!((accepted.len(), rejected.len()), (0, 1));
    device.assert_settled(&driver);
}

#[test]
fn recovery_35_unreadable_update_is_tried_again() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    device.fabric().update_region(0, 4 * MIB).unwrap();
    device
        .model()
        .inject(Fault::on(0x4800, FaultKind::ReturnCode(0x04)));
    assert!(driver.poll().is_err());
    assert_eq!(driver.block_size(), 2 * MIB);
    assert_eq!(
        driver.poll().unwrap(),
        [DeviceEvent::RegionsUpdated { region: 0 }]
    );
    assert_eq!(driver.block_size(), 4 * MIB);
}

/// An interrupt comes only when the log goes from empty to one record: what arrives while it is
/// being drained must be found by looking again.
#[test]
fn recovery_36_record_that_comes_during_a_drain_is_not_missed() {
    only_on_the_model!("extents that no device should offer");
    let device = test_device(ModelConfig::default());
    let fabric = device.fabric().clone();
    let late = device.blocks(20, 1);
    let mut reads = 0;
    let wire = tapped(
        device.mmio(),
        Hook(move |opcode| {
            // Opening reads an empty log; the poll reads one record, and then an empty log.
            reads += u32::from(opcode == 0x0100);
            if opcode == 0x0100 && reads == 3 {
                fabric.add_unchecked(&[Extent::untagged(late)]);
            }
        }),
    );
    let mut driver = DcDevice::open(wire, config()).unwrap();
    device.offer(&[device.blocks(0, 1)]);
    let (accepted, _) = outcome(&driver.poll().unwrap());
    assert_eq!(ranges(&accepted), [device.blocks(0, 1), late]);
    let audit = device.model().audit();
    assert_eq!((audit.records_in_log, audit.groups_pending), (0, 0));
}

#[test]
fn recovery_36_log_is_read_now_and_then_without_a_signal() {
    only_on_the_model!("a device made for the test");
    let device = test_device(ModelConfig::default());
    let interval = Duration::from_millis(30);
    let mut driver = device.open_with(DeviceConfig {
        drain_interval: interval,
        ..config()
    });
    let opened_at = Instant::now();
    device.model().mute_event_status(true);
    let offered = device.offer(&[device.blocks(0, 1)]);
    let mut polls = 0;
    while driver.accepted().is_empty() {
        driver.poll().unwrap();
        polls += 1;
        assert!(
            opened_at.elapsed() < 20 * interval,
            "the offer was never found"
        );
        thread::sleep(interval / 10);
    }
    assert_eq!(driver.accepted(), offered);
    assert!(polls > 1, "not at every poll");
}

#[test]
fn recovery_36_idle_polls_send_no_command() {
    let (device, mut driver) = opened();
    driver.poll().unwrap();
    let commands = device.sent_in_all();
    for _ in 0..10 {
        driver.poll().unwrap();
    }
    assert_eq!(device.sent_in_all(), commands);
}

#[test]
fn recovery_36_enabling_interrupts_leaves_the_other_logs_alone() {
    only_on_the_model!("a look into the device");
    let (device, mut driver) = opened();
    assert_eq!(driver.enable_interrupts(true).unwrap(), 6);
    assert_eq!(driver.enable_interrupts(false).unwrap(), 0);
    let audit = device.model().audit();
    assert_eq!((audit.count(0x0102), audit.count(0x0103)), (4, 2));
}

#[test]
fn recovery_37_one_command_is_in_flight() {
    only_on_the_model!("a device made for the test");
    let device = test_device(ModelConfig {
        doorbell_delay: Duration::from_micros(300),
        ..ModelConfig::default()
    });
    let driver = Arc::new(Mutex::new(device.open()));
    let device = Arc::new(device);
    thread::scope(|scope| {
        for worker in 0..4 {
            let (driver, device) = (Arc::clone(&driver), Arc::clone(&device));
            scope.spawn(move || {
                for round in 0..10 {
                    let blocks = device.blocks(40 * worker + 4 * round, 2);
                    device.offer(&[blocks]);
                    let mut driver = driver.lock().unwrap();
                    driver.poll().unwrap();
                    driver.release(&[blocks]).unwrap();
                }
            });
        }
    });
    let driver = driver.lock().unwrap();
    assert_eq!(driver.counters().groups_answered, 40);
    // The model writes down every register touched while a command is running.
    device.assert_settled(&driver);
}

/// Reads one byte of the device's memory, as the host finds it through the decoder.
fn byte_at(device: &TestDevice, range: DpaRange) -> u8 {
    let mut byte = [0];
    pread(device.model().memory(), &mut byte, offset(device, range)).unwrap();
    byte[0]
}

fn offset(device: &TestDevice, range: DpaRange) -> u64 {
    range.start.0 - device.model().memory_span().start.0
}

#[test]
fn recovery_38_only_sanitizing_regions_give_clean_memory() {
    only_on_the_model!("a device made for the test");
    let clean = ModelRegion {
        sanitizes: true,
        ..ModelRegion::of(256 * MIB)
    };
    for (region, known_zero) in [(ModelRegion::of(256 * MIB), false), (clean, true)] {
        let device = test_device(ModelConfig {
            dc_regions: vec![region],
            ..ModelConfig::default()
        });
        let mut driver = device.open();
        let blocks = device.blocks(3, 1);
        device.offer(&[blocks]);
        driver.poll().unwrap();
        pwrite(device.model().memory(), &[0xa5], offset(&device, blocks)).unwrap();
        driver.release(&[blocks]).unwrap();
        device.offer(&[blocks]);
        driver.poll().unwrap();
        assert_eq!(driver.sanitizes(&blocks), known_zero);
        assert_eq!(
            byte_at(&device, blocks) == 0,
            known_zero,
            "the driver must not promise more"
        );
    }
}

#[test]
fn recovery_39_what_is_written_is_read_and_nothing_else_is_touched() {
    only_on_the_model!("a look into the device");
    let (device, mut driver) = opened();
    device.offer(&[device.blocks(0, 2), device.blocks(100, 1)]);
    driver.poll().unwrap();
    let window = HpaWindow {
        base: Hpa(1 << 40),
        len: 4 << 30,
    };
    let decoded = driver.program_decoder(window).unwrap();
    let mut written = 0;
    for extent in driver.accepted() {
        let hpa = decoded.hpa(extent.range.start).unwrap();
        assert_eq!(device.model().decode(hpa), Some(extent.range.start));
        let at = hpa.0 - window.base.0;
        assert_eq!(at, offset(&device, extent.range));
        let pattern = vec![(at >> 21) as u8 + 1; extent.range.len as usize];
        pwrite(device.model().memory().as_fd(), &pattern, at).unwrap();
        written += extent.range.len;
        let mut read = vec![0; pattern.len()];
        pread(device.model().memory(), &mut read, at).unwrap();
        assert_eq!(read, pattern);
    }
    assert_eq!(decoded.hpa(driver.dc_span().end()), None);
    driver.poll().unwrap();
    // Of the file, only what was written has pages: nobody probed beyond the extents.
    let blocks = fstat(device.model().memory()).unwrap().st_blocks as u64;
    assert_eq!((written, blocks * 512), (3 * BLOCK, 3 * BLOCK));
}
