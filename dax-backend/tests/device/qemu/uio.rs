//! QEMU's type 3 device under the tests from inside its guest: registers are BARs, mapped through sysfs, and the
//! monitor is a virtio port away. There is one device for all tests, which run one after the other.

use std::fs::OpenOptions;
use std::sync::OnceLock;

use dax_backend::address::DpaRange;
use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::extent::ExtentTag;
use dax_backend::mmio::Mmio;
use dax_backend::orchestrator::qmp::QmpTarget;
use dax_backend::pci::{PciAddress, Sysfs};
use parking_lot::Mutex;

use super::Machine;
use super::monitor::Monitor;

/// The device at the PCI address `DCM_TEST_BDF`, bound to `uio_pci_generic`, with QMP at `DCM_TEST_MONITOR`.
pub(crate) struct Uio {
    address: PciAddress,
    monitor: &'static Mutex<Monitor>,
}

impl Uio {
    /// The device as a test finds it: without capacity.
    pub(crate) fn start() -> Self {
        static MONITOR: OnceLock<Mutex<Monitor>> = OnceLock::new();
        let named = |name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
        let uio = Self {
            address: named("DCM_TEST_BDF").parse().expect("a PCI address"),
            monitor: MONITOR.get_or_init(|| {
                let path = named("DCM_TEST_MONITOR");
                let port = OpenOptions::new().read(true).write(true).open(path);
                Mutex::new(Monitor::new(port.expect("a port")))
            }),
        };
        let mut device = DcDevice::open(uio.mmio(), DeviceConfig::default()).expect("it opens");
        let left: Vec<DpaRange> = device.accepted().iter().map(|held| held.range).collect();
        if !left.is_empty() {
            device.release(&left).expect("it takes back");
        }
        uio
    }
}

impl Machine for Uio {
    fn mmio(&self) -> Box<dyn Mmio> {
        Box::new(Sysfs::default().open(self.address).expect("bound to uio"))
    }

    fn target(&self) -> Option<QmpTarget> {
        None
    }

    fn add(&self, ranges: &[DpaRange], tag: ExtentTag) {
        self.monitor.lock().add(ranges, tag);
    }

    fn release(&self, ranges: &[DpaRange]) {
        self.monitor.lock().release(ranges);
    }
}
