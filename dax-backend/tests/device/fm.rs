//! A fabric manager's mailbox: capacity is asked for in the FM-API, through the mailbox of a switch and in one
//! of the device itself.

use dax_backend::address::DpaRange;
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::error::OpenError;
use dax_backend::extent::ExtentTag;
use dax_backend::mmio::{Mmio, RegisterBlock};
use dax_backend::model::{ModelConfig, SwitchMmio};
use dax_backend::orchestrator::fm::FmOrchestrator;
use dax_backend::orchestrator::{Orchestrator, OrchestratorError};
use dax_backend::region::DcRegion;

use crate::bench::{
    BLOCK, Driver, TestDevice, asked_for, only_on_the_model, opened, ranges, tag, test_device,
};
use crate::qemu::{Machine, Qemu};

/// Where the device is behind the switch.
const PORT: u8 = 3;

type Manager = FmOrchestrator<SwitchMmio>;

fn manager(device: &TestDevice, driver: &Driver, port: Option<u8>) -> Manager {
    let registers = device.model().fm_mailbox(port);
    FmOrchestrator::open(registers, port, driver.regions()).expect("a mailbox")
}

fn refusal(result: Result<impl Sized, OrchestratorError>) -> String {
    match result {
        Err(OrchestratorError::Refused { reason }) => reason,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

#[test]
fn capacity_is_added_and_asked_back_through_a_switch_and_in_the_device_s_own_mailbox() {
    only_on_the_model!("a switch in software");
    for port in [Some(PORT), None] {
        let (device, mut driver) = opened();
        let mut manager = manager(&device, &driver, port);
        let offered = manager.add(&[4 * BLOCK, BLOCK], ExtentTag::NULL).unwrap();
        driver.poll().unwrap();
        assert_eq!(ranges(driver.accepted()), ranges(&offered));
        assert_eq!(device.model().audit().groups_offered, 1, "one More group");
        let tagged = manager.add(&[2 * BLOCK], tag(7)).unwrap();
        driver.poll().unwrap();
        assert!(driver.accepted().contains(&tagged[0]), "with its tag");

        let first = offered[0].range;
        manager.release(&[first], false).unwrap();
        let events = driver.poll().unwrap();
        let asked = |event: &DeviceEvent| matches!(event, DeviceEvent::ReleaseRequested { range, .. } if *range == first);
        assert!(events.iter().any(asked), "{events:?}");
        manager.release(&[offered[1].range], true).unwrap();
        let events = driver.poll().unwrap();
        let taken = |event: &DeviceEvent| matches!(event, DeviceEvent::ForcedRelease { .. });
        assert!(events.iter().any(taken), "{events:?}");
        device.assert_settled(&driver);
    }
}

#[test]
fn what_is_somebodys_is_passed_over_and_what_is_not_there_refused() {
    only_on_the_model!("a switch in software");
    let device = test_device(ModelConfig::one_region(8 * BLOCK));
    let mut driver = device.open();
    // Offered by another fabric manager, and not answered yet: nobody told this one.
    let others = device.blocks(0, 2);
    device.offer(&[others]);
    let mut manager = manager(&device, &driver, Some(PORT));
    let offered = manager.add(&[2 * BLOCK], ExtentTag::NULL).unwrap();
    assert_eq!(ranges(&offered), [device.blocks(2, 2)]);
    driver.poll().unwrap();
    assert_eq!(ranges(driver.accepted()), [others, offered[0].range]);

    manager.held(driver.accepted());
    let error = manager.add(&[5 * BLOCK], ExtentTag::NULL).unwrap_err();
    let wanted = 5 * BLOCK;
    assert!(
        matches!(error, OrchestratorError::NoCapacity { wanted: w, available } if w == wanted && available == 4 * BLOCK),
        "{error}"
    );
    let reason = refusal(manager.release(&[device.blocks(6, 1)], false));
    assert!(reason.contains("5605h"), "{reason}");
    assert!(reason.contains("invalid physical address"), "{reason}");
    let beyond = DpaRange {
        start: device.blocks(8, 1).start,
        len: BLOCK,
    };
    let reason = refusal(manager.release(&[beyond], false));
    assert!(reason.contains("no DC region"), "{reason}");
    device.assert_settled(&driver);
}

#[test]
fn another_port_of_the_switch_and_another_kind_of_mailbox_are_told() {
    only_on_the_model!("a switch in software");
    let (device, driver) = opened();
    let open = |registers, port| FmOrchestrator::open(registers, port, driver.regions()).unwrap();
    let mut elsewhere = open(device.model().fm_mailbox(Some(PORT)), Some(PORT + 1));
    let reason = refusal(elsewhere.add(&[BLOCK], ExtentTag::NULL));
    assert!(reason.contains("hands nothing on to port 4"), "{reason}");
    // A switch itself has no capacity.
    let mut without_port = open(device.model().fm_mailbox(Some(PORT)), None);
    let reason = refusal(without_port.add(&[BLOCK], ExtentTag::NULL));
    assert!(reason.contains("(5604h) with unsupported"), "{reason}");
    // Nor has the mailbox that hosts use.
    let registers: Box<dyn Mmio> = device.mmio();
    let mut hosts = FmOrchestrator::open(registers, None, driver.regions()).unwrap();
    let reason = refusal(hosts.add(&[BLOCK], ExtentTag::NULL));
    assert!(reason.contains("has no FM-API"), "{reason}");
    assert_eq!(device.model().audit().groups_offered, 0);
    let nothing = FmOrchestrator::open(Nothing, None, driver.regions());
    assert!(matches!(nothing, Err(OpenError::NoCapability { .. })));
}

/// What is not there reads as all ones.
struct Nothing;

impl Mmio for Nothing {
    fn block_len(&self, _: RegisterBlock) -> u32 {
        0x1000
    }

    fn read32(&mut self, _: RegisterBlock, _: u32) -> u32 {
        u32::MAX
    }

    fn read64(&mut self, _: RegisterBlock, _: u32) -> u64 {
        u64::MAX
    }

    fn write32(&mut self, _: RegisterBlock, _: u32, _: u32) {}

    fn write64(&mut self, _: RegisterBlock, _: u32, _: u64) {}

    fn read_payload(&mut self, _: u32, payload: &mut [u8]) {
        payload.fill(0xff);
    }

    fn write_payload(&mut self, _: u32, _: &[u8]) {}
}

/// QEMU 10.0 has the switch and its tunnel, and no 5604h at the other end of it; 10.1 has.
#[test]
fn qemu_s_switch_hands_the_message_on_and_its_answer_back() {
    if asked_for() != "qemu" {
        println!("SKIPPED: a test of QEMU's switch, without a guest (DCM_TEST_DEVICE=qemu)");
        return;
    }
    let machine = Qemu::with_a_switch();
    let region = DcRegion {
        index: 0,
        base: dax_backend::address::Dpa(0),
        decode_len: 1 << 30,
        len: 1 << 30,
        block_size: BLOCK,
        sanitizes: false,
        dsmad_handle: 0,
    };
    let open = |port| FmOrchestrator::open(machine.mmio(), Some(port), &[region]).unwrap();
    match open(0).add(&[BLOCK], ExtentTag::NULL) {
        Ok(offered) => assert_eq!(offered[0].range.len, BLOCK),
        result => {
            let reason = refusal(result);
            assert!(reason.contains("(5604h) with unsupported"), "{reason}");
        }
    }
    let reason = refusal(open(7).add(&[BLOCK], ExtentTag::NULL));
    assert!(reason.contains("hands nothing on to port 7"), "{reason}");
}
