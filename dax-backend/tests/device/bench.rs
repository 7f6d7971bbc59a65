//! What tests work with: a device, the driver for it, and the fabric manager's side.

use std::time::Duration;

use dax_backend::address::{Dpa, DpaRange};
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::extent::{Extent, ExtentTag};
use dax_backend::mailbox::MailboxConfig;
use dax_backend::mmio::Mmio;
use dax_backend::model::{
    AddPolicy, AddRequest, Fabric, ModelConfig, ReleasePolicy, SlowOffer, SoftwareDevice,
};
use dax_backend::orchestrator::Orchestrator;
use dax_backend::orchestrator::qmp::QmpOrchestrator;
use dax_backend::region::DcRegion;
use dax_backend::staging::{Preparation, Prepare, RejectReason};

use crate::qemu::uio::Uio;
use crate::qemu::{Machine, Qemu};
use crate::wire::{Doorbells, tapped};

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const BLOCK: u64 = 2 * MIB;

/// The driver under test, on whatever gives it registers.
pub(crate) type Driver = DcDevice<Box<dyn Mmio>>;

/// A device to test the driver on, and the fabric manager behind it.
pub(crate) struct TestDevice {
    vehicle: Vehicle,
    doorbells: Doorbells,
}

enum Vehicle {
    Model {
        model: SoftwareDevice,
        fabric: Fabric,
    },
    Qemu(Box<dyn Machine + Send + Sync>),
}

/// What `DCM_TEST_DEVICE` asks for: the software model, or QEMU's device without a guest (`qemu`) or from inside
/// one (`uio`).
pub(crate) fn asked_for() -> String {
    let device = std::env::var("DCM_TEST_DEVICE").unwrap_or_else(|_| "model".into());
    assert!(
        ["model", "qemu", "uio"].contains(&device.as_str()),
        "DCM_TEST_DEVICE={device}: model, qemu or uio"
    );
    device
}

/// Whether the tests run on QEMU's device instead of the software model.
pub(crate) fn on_qemu() -> bool {
    asked_for() != "model"
}

/// Ends a test that another device than the model can't run.
macro_rules! only_on_the_model {
    ($why:literal) => {
        if $crate::bench::on_qemu() {
            println!("SKIPPED: only the software device can do it: {}", $why);
            return;
        }
    };
}
pub(crate) use only_on_the_model;

/// The software device with `config`.
pub(crate) fn test_device(config: ModelConfig) -> TestDevice {
    assert!(!on_qemu(), "only_on_the_model! is missing");
    let model = SoftwareDevice::new(config).expect("a memfd");
    TestDevice {
        vehicle: Vehicle::Model {
            fabric: model.fabric(),
            model,
        },
        doorbells: Doorbells::default(),
    }
}

/// A device of 1 GiB in 2 MiB blocks: the model, or QEMU's.
pub(crate) fn any_device() -> TestDevice {
    if !on_qemu() {
        return test_device(ModelConfig::default());
    }
    TestDevice {
        vehicle: Vehicle::Qemu(match asked_for().as_str() {
            "uio" => Box::new(Uio::start()),
            _ => Box::new(Qemu::start()),
        }),
        doorbells: Doorbells::default(),
    }
}

/// [`any_device`] and its driver.
pub(crate) fn opened() -> (TestDevice, Driver) {
    let device = any_device();
    let driver = device.open();
    (device, driver)
}

/// Time-outs short enough for tests. QEMU answers when it gets a processor.
pub(crate) fn config() -> DeviceConfig {
    if on_qemu() {
        return DeviceConfig::default();
    }
    DeviceConfig {
        mailbox: MailboxConfig {
            doorbell_timeout: Duration::from_millis(40),
            background_timeout: Duration::from_millis(200),
            attempts: 4,
            first_backoff: Duration::from_micros(100),
        },
        ready_timeout: Duration::from_millis(200),
        ..DeviceConfig::default()
    }
}

impl TestDevice {
    /// The software device itself.
    pub(crate) fn model(&self) -> &SoftwareDevice {
        match &self.vehicle {
            Vehicle::Model { model, .. } => model,
            Vehicle::Qemu(_) => panic!("only_on_the_model! is missing"),
        }
    }

    /// The software device's fabric manager.
    pub(crate) fn fabric(&self) -> &Fabric {
        match &self.vehicle {
            Vehicle::Model { fabric, .. } => fabric,
            Vehicle::Qemu(_) => panic!("only_on_the_model! is missing"),
        }
    }

    pub(crate) fn mmio(&self) -> Box<dyn Mmio> {
        let mmio: Box<dyn Mmio> = match &self.vehicle {
            Vehicle::Model { model, .. } => Box::new(model.mmio()),
            Vehicle::Qemu(qemu) => qemu.mmio(),
        };
        tapped(mmio, self.doorbells.clone())
    }

    /// Who adds capacity for a broker over this device, if it can be reached from here.
    pub(crate) fn orchestrator(&self, regions: &[DcRegion]) -> Option<Box<dyn Orchestrator>> {
        match &self.vehicle {
            Vehicle::Model { fabric, .. } => Some(Box::new(fabric.clone())),
            Vehicle::Qemu(qemu) => {
                let target = qemu.target()?;
                Some(Box::new(QmpOrchestrator::new(target, regions)))
            }
        }
    }

    /// How many commands of a kind were sent, all drivers together.
    pub(crate) fn sent(&self, opcode: u16) -> usize {
        self.doorbells.count(|rung| rung == opcode)
    }

    /// How many commands were sent.
    pub(crate) fn sent_in_all(&self) -> usize {
        self.doorbells.count(|_| true)
    }

    pub(crate) fn open(&self) -> Driver {
        self.open_with(config())
    }

    pub(crate) fn open_with(&self, config: DeviceConfig) -> Driver {
        DcDevice::open(self.mmio(), config).expect("the device opens")
    }

    /// Block `start` of DC region 0 and `len` blocks from there.
    pub(crate) fn blocks(&self, start: u64, len: u64) -> DpaRange {
        let base = match &self.vehicle {
            Vehicle::Model { fabric, .. } => fabric.region_base(0).expect("a region"),
            Vehicle::Qemu(_) => Dpa(0),
        };
        range(base.0 + start * BLOCK, len * BLOCK)
    }

    /// Offers ranges of region 0 as one group.
    pub(crate) fn offer(&self, ranges: &[DpaRange]) -> Vec<Extent> {
        self.offer_tagged(ranges, ExtentTag::NULL)
    }

    pub(crate) fn offer_tagged(&self, ranges: &[DpaRange], tag: ExtentTag) -> Vec<Extent> {
        match &self.vehicle {
            Vehicle::Model { fabric, .. } => {
                let policy = AddPolicy::Prescriptive(ranges.to_vec());
                let request = AddRequest {
                    policy,
                    region: 0,
                    tag,
                };
                fabric.add(&request).expect("the fabric offers")
            }
            Vehicle::Qemu(qemu) => {
                qemu.add(ranges, tag);
                let extent = |&range| Extent {
                    range,
                    tag,
                    shared_seq: 0,
                };
                ranges.iter().map(extent).collect()
            }
        }
    }

    /// Offers ranges of region 0 as one group, whose records come later.
    pub(crate) fn offer_slowly(&self, ranges: &[DpaRange]) -> SlowOffer {
        let policy = AddPolicy::Prescriptive(ranges.to_vec());
        let request = AddRequest {
            policy,
            region: 0,
            tag: ExtentTag::NULL,
        };
        self.fabric()
            .add_slowly(&request)
            .expect("the fabric offers")
    }

    /// `count` single blocks of region 0 from `start`, every other one, so that none touch.
    pub(crate) fn scattered(&self, start: u64, count: u64) -> Vec<DpaRange> {
        (0..count)
            .map(|index| self.blocks(start + 2 * index, 1))
            .collect()
    }

    pub(crate) fn ask_back(&self, ranges: &[DpaRange]) {
        match &self.vehicle {
            Vehicle::Model { fabric, .. } => {
                let policy = ReleasePolicy::Prescriptive(ranges.to_vec());
                fabric.release(&policy, false).expect("the fabric asks");
            }
            Vehicle::Qemu(qemu) => qemu.release(ranges),
        }
    }

    pub(crate) fn take_away(&self, ranges: &[DpaRange]) {
        let policy = ReleasePolicy::Prescriptive(ranges.to_vec());
        self.fabric()
            .release(&policy, true)
            .expect("the fabric takes");
    }

    /// The host has kept to the protocol, and nothing is left unanswered or unread. QEMU does not tell
    /// what it thinks of its host: there, a driver that starts anew must find the same and nothing else.
    pub(crate) fn assert_settled(&self, driver: &Driver) {
        match &self.vehicle {
            Vehicle::Model { model, .. } => {
                let audit = model.audit();
                assert!(audit.is_clean(), "the host broke the protocol: {audit:?}");
                assert_eq!(audit.groups_pending, 0, "groups left unanswered");
                assert_eq!(audit.records_in_log, 0, "records left in the log");
                let listed = sorted(&audit.accepted);
                assert_eq!(listed, driver.accepted(), "device and driver disagree");
            }
            Vehicle::Qemu(_) => {
                let answers = self.sent(0x4802);
                let anew = self.open();
                assert_eq!(
                    anew.accepted(),
                    driver.accepted(),
                    "device and driver disagree"
                );
                assert_eq!(anew.counters().records, 0, "records left in the log");
                assert_eq!(self.sent(0x4802), answers, "groups left unanswered");
            }
        }
    }
}

pub(crate) fn range(start: u64, len: u64) -> DpaRange {
    DpaRange {
        start: Dpa(start),
        len,
    }
}

pub(crate) fn tag(number: u8) -> ExtentTag {
    ExtentTag([number; 16])
}

pub(crate) fn sorted(extents: &[Extent]) -> Vec<Extent> {
    let mut extents = extents.to_vec();
    extents.sort_by_key(|extent| extent.range);
    extents
}

pub(crate) fn ranges(extents: &[Extent]) -> Vec<DpaRange> {
    extents.iter().map(|extent| extent.range).collect()
}

/// What was accepted and what was rejected, of all events together.
pub(crate) fn outcome(events: &[DeviceEvent]) -> (Vec<Extent>, Vec<Extent>) {
    let (mut accepted, mut rejected) = (Vec::new(), Vec::new());
    for event in events {
        match event {
            DeviceEvent::Accepted { extents } => accepted.extend_from_slice(extents),
            DeviceEvent::Rejected { extents } => {
                rejected.extend(extents.iter().map(|(extent, _)| *extent));
            }
            _ => {}
        }
    }
    (accepted, rejected)
}

/// The host's side of an offer, as a closure.
pub(crate) struct Choose<F>(pub(crate) F);

impl<F: FnMut(&Extent) -> Preparation + Send> Prepare for Choose<F> {
    fn prepare(&mut self, offered: &Extent) -> Preparation {
        (self.0)(offered)
    }
}

/// Time-outs for tests, and a host that chooses what it takes.
pub(crate) fn choosing(
    choose: impl FnMut(&Extent) -> Preparation + Send + 'static,
) -> DeviceConfig {
    DeviceConfig {
        prepare: Box::new(Choose(choose)),
        ..config()
    }
}

/// The reasons of all rejections, in order.
pub(crate) fn reasons(events: &[DeviceEvent]) -> Vec<RejectReason> {
    let rejected = events.iter().filter_map(|event| match event {
        DeviceEvent::Rejected { extents } => Some(extents),
        _ => None,
    });
    rejected.flatten().map(|(_, reason)| *reason).collect()
}
