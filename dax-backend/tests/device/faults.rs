//! Devices that say things that make no sense: each gets its own error, and nothing is lost.

use dax_backend::capacity::CapacityDevice;
use dax_backend::device::DcDevice;
use dax_backend::error::{DeviceError, OpenError};
use dax_backend::mailbox::MailboxError;
use dax_backend::model::{Fault, FaultKind, ModelConfig};
use proptest::prelude::*;

use crate::bench::{config, on_qemu, only_on_the_model, opened, outcome, test_device};

/// Injects a fault into an offer's way, expects an error, and expects the offer to be accepted
/// by the next poll all the same.
fn is_told_and_loses_nothing(opcode: u16, kind: FaultKind, told: &str) {
    let (device, mut driver) = opened();
    let offered = device.offer(&device.scattered(0, 3));
    device.model().inject(Fault::on(opcode, kind));
    let error = driver.poll().unwrap_err().to_string();
    assert!(error.contains(told), "{error:?} does not say {told:?}");
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    assert_eq!(device.model().audit().answers_to(0), 1);
    device.assert_settled(&driver);
}

#[test]
fn short_response_is_told() {
    only_on_the_model!("the device goes wrong on order");
    let told = "Get Event Records with a malformed response: the event records needs 32 bytes \
                and the payload has 3";
    is_told_and_loses_nothing(0x0100, FaultKind::OutputLength(3), told);
    is_told_and_loses_nothing(0x0100, FaultKind::OutputLength(32 + 128), "needs 416 bytes");
}

#[test]
fn response_longer_than_the_payload_is_cut() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    let offered = device.offer(&device.scattered(0, 3));
    device
        .model()
        .inject(Fault::on(0x0100, FaultKind::OutputLength(0x1f_ffff)));
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    device.assert_settled(&driver);
}

#[test]
fn unknown_return_codes_are_told_with_their_value() {
    only_on_the_model!("the device goes wrong on order");
    for opcode in [0x0100, 0x0101, 0x4802] {
        is_told_and_loses_nothing(
            opcode,
            FaultKind::ReturnCode(0x7777),
            "unknown return code 0x7777",
        );
    }
}

#[test]
fn refused_clear_is_told_and_repeated() {
    only_on_the_model!("the device goes wrong on order");
    is_told_and_loses_nothing(0x0101, FaultKind::ReturnCode(0x0e), "invalid handle (0x0e)");
}

/// Says Success to Clear Event Records and clears nothing.
#[test]
fn log_that_does_not_clear_is_told_and_not_answered_twice() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    let offered = device.offer(&device.scattered(0, 3));
    for _ in 0..3 {
        device
            .model()
            .inject(Fault::on(0x0101, FaultKind::ReturnCode(0)));
    }
    let error = driver.poll().unwrap_err();
    assert!(
        matches!(error, DeviceError::EventLogEndless { .. }),
        "{error}"
    );
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    assert_eq!(device.model().audit().answers_to(0), 1);
    device.assert_settled(&driver);
}

#[test]
fn extent_list_that_ends_early_is_told() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    device.offer(&device.scattered(0, 3));
    driver.poll().unwrap();
    let mut empty = vec![0; 16];
    empty[4] = 3;
    device
        .model()
        .inject(Fault::on(0x4801, FaultKind::Output(empty)));
    let error = driver.listed().unwrap_err();
    assert!(
        matches!(
            error,
            DeviceError::ExtentListTruncated { read: 0, total: 3 }
        ),
        "{error}"
    );
}

#[test]
fn regions_that_make_no_sense_are_told() {
    only_on_the_model!("the device goes wrong on order");
    let device = test_device(ModelConfig::default());
    let mut none = vec![0; 8 + 16];
    none[0] = 1;
    device
        .model()
        .inject(Fault::on(0x4800, FaultKind::Output(none)));
    let error = DcDevice::open(device.mmio(), config()).err().unwrap();
    assert!(error.to_string().contains("no DC region"), "{error}");
    let mut zeroes = vec![0; 8 + 40 + 16];
    (zeroes[0], zeroes[1]) = (1, 1);
    device
        .model()
        .inject(Fault::on(0x4800, FaultKind::Output(zeroes)));
    let error = DcDevice::open(device.mmio(), config()).err().unwrap();
    assert_eq!(
        error.to_string(),
        "DC region 0 is unusable: block size 0x0 is not a power of 2 from 64 up"
    );
}

#[test]
fn device_without_dynamic_capacity_is_told() {
    only_on_the_model!("a device made for the test");
    for opcode in 0x4800..=0x4803 {
        let device = test_device(ModelConfig {
            without_commands: vec![opcode],
            ..ModelConfig::default()
        });
        let error = DcDevice::open(device.mmio(), config()).err().unwrap();
        assert!(
            matches!(error, OpenError::NotDynamicCapacity { opcode: missing } if missing == opcode),
            "{error}"
        );
        assert!(error.to_string().contains("dcm serve --dax"), "{error}");
    }
}

#[test]
fn device_without_a_clock_is_fine() {
    only_on_the_model!("a device made for the test");
    let device = test_device(ModelConfig {
        without_commands: vec![0x0301],
        ..ModelConfig::default()
    });
    let mut driver = device.open();
    let offered = device.offer(&[device.blocks(0, 1)]);
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    // Without time stamps, records that come again differ in nothing but their handle.
    driver.release(&[device.blocks(0, 1)]).unwrap();
    let offered = device.offer(&[device.blocks(0, 1)]);
    assert_eq!(outcome(&driver.poll().unwrap()).0, offered);
    device.assert_settled(&driver);
}

#[test]
fn commands_refused_by_the_mailbox_say_which() {
    only_on_the_model!("the device goes wrong on order");
    let (device, mut driver) = opened();
    device
        .model()
        .inject(Fault::on(0x4801, FaultKind::ReturnCode(0x16)));
    let error = driver.listed().unwrap_err();
    let DeviceError::Mailbox(MailboxError::Returned { command, .. }) = error else {
        panic!("{error}");
    };
    assert_eq!(command, "Get Dynamic Capacity Extent List");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever bytes a device answers with, the driver neither panics nor hangs nor answers a
    /// group that is not there.
    #[test]
    fn random_responses_are_survived(
        responses in prop::collection::vec(
            (
                prop::sample::select(vec![0x0100, 0x0101, 0x4800, 0x4801, 0x4802, 0x4803]),
                prop::collection::vec(any::<u8>(), 0..300),
            ),
            1..12,
        )
    ) {
        if on_qemu() {
            println!("SKIPPED: only the software device can do it: the device goes wrong on order");
            return Ok(());
        }
        let (device, mut driver) = opened();
        for (opcode, output) in responses {
            device.model().inject(Fault::on(opcode, FaultKind::Output(output)));
        }
        for round in 0..4 {
            let blocks = device.blocks(4 * round, 2);
            device.offer(&[blocks]);
            let _ = driver.poll();
            let _ = driver.listed();
            let _ = driver.release(&[blocks]);
        }
        prop_assert_eq!(device.model().audit().violations, Vec::<String>::new());
    }

    /// The same while opening, where everything is read for the first time.
    #[test]
    fn random_responses_at_start_are_survived(
        opcode in prop::sample::select(vec![0x0400, 0x0401, 0x4000, 0x4800, 0x4801, 0x0100]),
        output in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        if on_qemu() {
            println!("SKIPPED: only the software device can do it: the device goes wrong on order");
            return Ok(());
        }
        let device = test_device(ModelConfig::default());
        device.model().inject(Fault::on(opcode, FaultKind::Output(output)));
        let _ = DcDevice::open(device.mmio(), config());
    }
}
