//! The doorbell protocol: slow devices, busy ones, background operations.

use std::time::{Duration, Instant};

use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::error::{DeviceError, OpenError};
use dax_backend::mailbox::MailboxError;
use dax_backend::model::{Fault, FaultKind, ModelConfig};

use crate::bench::{config, only_on_the_model, opened, outcome, test_device};
use crate::wire::{Plug, tapped};

#[test]
fn slow_doorbell_is_waited_for() {
    only_on_the_model!("a group that is longer than its log");
    let delay = Duration::from_millis(2);
    let device = test_device(ModelConfig {
        doorbell_delay: delay,
        ..ModelConfig::default()
    });
    let mut driver = device.open();
    let offered = device.offer(&device.scattered(0, 3));
    let started = Instant::now();
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    assert!(
        started.elapsed() >= 4 * delay,
        "read, clear, answer and a last look"
    );
    assert_eq!(driver.counters().timeouts, 0);
    device.assert_settled(&driver);
}

#[test]
fn command_of_an_earlier_owner_is_waited_out() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    device.model().inject(Fault::on(
        0x4801,
        FaultKind::Delay(Duration::from_millis(60)),
    ));
    assert!(driver.listed().is_err());
    drop(driver);
    let driver = device.open();
    device.assert_settled(&driver);
}

#[test]
fn hanging_command_is_a_timeout_and_the_next_one_is_not_sent() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    device.model().inject(Fault::on(0x4801, FaultKind::Hang));
    let error = driver.listed().unwrap_err();
    assert_eq!(
        error.to_string(),
        "Get Dynamic Capacity Extent List is not done after 40 ms; \
         whether it took effect is not known"
    );
    let error = driver.listed().unwrap_err();
    assert!(
        matches!(error, DeviceError::Mailbox(MailboxError::Occupied { .. })),
        "{error}"
    );
    assert_eq!(driver.counters().timeouts, 1);
    let offered = device.offer(&[device.blocks(0, 1)]);
    assert!(driver.poll().is_err());
    device.model().reset();
    assert_eq!(
        outcome(&driver.poll().unwrap()).0,
        offered,
        "nothing is lost"
    );
    device.assert_settled(&driver);
}

#[test]
fn busy_device_is_tried_again_but_not_for_ever() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    for _ in 0..3 {
        device
            .model()
            .inject(Fault::on(0x4801, FaultKind::ReturnCode(0x06)));
    }
    driver.listed().unwrap();
    assert_eq!(driver.counters().retries, 3);
    for _ in 0..4 {
        device
            .model()
            .inject(Fault::on(0x4801, FaultKind::ReturnCode(0x05)));
    }
    let error = driver.listed().unwrap_err();
    assert!(
        error.to_string().contains("retry required (0x05)"),
        "{error}"
    );
}

#[test]
fn background_operation_is_waited_for() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    let offered = device.offer(&[device.blocks(0, 1)]);
    let time = Duration::from_millis(10);
    device
        .model()
        .inject(Fault::on(0x4802, FaultKind::Background(time)));
    let started = Instant::now();
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    assert!(started.elapsed() >= time);
    device.assert_settled(&driver);
}

#[test]
fn background_operation_that_does_not_end_is_a_timeout() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    let offered = device.offer(&[device.blocks(0, 1)]);
    let for_ever = Duration::from_secs(3600);
    device
        .model()
        .inject(Fault::on(0x4802, FaultKind::Background(for_ever)));
    let error = driver.poll().unwrap_err();
    assert!(
        matches!(error, DeviceError::Mailbox(MailboxError::Timeout { .. })),
        "{error}"
    );
    // It took effect when it started, which the extent list tells.
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    device.assert_settled(&driver);
}

#[test]
fn smallest_payload_is_enough() {
    only_on_the_model!("a group that is longer than its log");
    let device = test_device(ModelConfig {
        mailbox_payload: 256,
        ..ModelConfig::default()
    });
    let mut driver = device.open();
    let offered = device.offer(&device.scattered(0, 25));
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    let answers = device.model().audit().answers;
    let sizes: Vec<usize> = answers.iter().map(|answer| answer.ranges).collect();
    assert_eq!(sizes, [10, 10, 5]);
    assert_eq!(driver.listed().unwrap(), driver.accepted());
    device.assert_settled(&driver);
}

#[test]
fn device_gets_time_to_become_ready() {
    only_on_the_model!("a device made for the test");
    let ready_after = Duration::from_millis(30);
    let slow = || {
        test_device(ModelConfig {
            ready_after,
            ..ModelConfig::default()
        })
    };
    slow().open();
    let hurried = DeviceConfig {
        ready_timeout: Duration::from_millis(5),
        ..config()
    };
    let error = DcDevice::open(slow().mmio(), hurried).err().unwrap();
    assert!(matches!(error, OpenError::NotReady { .. }), "{error}");
}

#[test]
fn device_that_goes_away_is_told_and_nothing_hangs() {
    only_on_the_model!("a device made for the test");
    let device = test_device(ModelConfig::default());
    let plug = Plug::default();
    let mut driver = DcDevice::open(tapped(device.mmio(), plug.clone()), config()).unwrap();
    plug.pull();
    assert!(driver.poll().is_err());
    let error = DcDevice::open(tapped(device.mmio(), plug), config())
        .err()
        .unwrap();
    assert!(matches!(error, OpenError::NoCapability { .. }), "{error}");
}
