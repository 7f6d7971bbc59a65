//! A made-up sysfs and `/dev`, with what a machine with one CXL device has there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use dax_backend::address::{Hpa, HpaWindow};
use dax_backend::pci::{PciAddress, Sysfs};
use dax_backend::window::Platform;
use tempfile::TempDir;

pub(crate) const GIB: u64 = 1 << 30;
/// Where the device is.
pub(crate) const DEVICE: &str = "0000:0d:00.0";
/// Something that is no CXL device.
pub(crate) const DISK: &str = "0000:00:1f.2";
/// The firmware's window.
pub(crate) const WINDOW: HpaWindow = HpaWindow {
    base: Hpa(0x4_9000_0000),
    len: 8 * GIB,
};

pub(crate) fn device() -> PciAddress {
    DEVICE.parse().unwrap()
}

/// The tree, which goes with this value.
pub(crate) struct Tree {
    root: TempDir,
}

impl Tree {
    /// A machine with a CXL device behind a root port, driven by uio_pci_generic; a window to
    /// it, and no DAX device.
    pub(crate) fn new() -> Self {
        let tree = Self {
            root: tempfile::tempdir().unwrap(),
        };
        for driver in ["uio_pci_generic", "cxl_pci"] {
            tree.directory(&format!("sys/bus/pci/drivers/{driver}"));
        }
        tree.directory("sys/bus/dax/drivers/device_dax");
        tree.directory("dev");
        tree.write("sys/bus/pci/drivers_probe", "");
        tree.pci("pci0000:00", DISK, 0x01_0601);
        tree.pci("pci0000:0c/0000:0c:00.0", DEVICE, 0x05_0210);
        tree.write("sys/devices/pci0000:0c/firmware_node/uid", "12\n");
        tree.write_bytes("sys/devices/pci0000:0c/0000:0c:00.0/config", &[0; 4096]);
        tree.drive(DEVICE, "uio_pci_generic");
        tree.write_bytes("sys/firmware/acpi/tables/CEDT", &cedt(&[12]));
        // The host bridge's registers: no decoder, as with a single root port.
        let memory = fs::File::create(tree.path("dev/mem")).unwrap();
        memory.set_len(0x2_0000).unwrap();
        tree
    }

    pub(crate) fn path(&self, relative: &str) -> PathBuf {
        self.root.path().join(relative)
    }

    pub(crate) fn sysfs(&self) -> Sysfs {
        Sysfs::new(self.path("sys"))
    }

    pub(crate) fn platform(&self) -> Platform {
        Platform {
            sysfs: self.sysfs(),
            dev: self.path("dev"),
            dev_mem: false,
        }
    }

    pub(crate) fn directory(&self, relative: &str) {
        fs::create_dir_all(self.path(relative)).unwrap();
    }

    pub(crate) fn write(&self, relative: &str, text: &str) {
        self.write_bytes(relative, text.as_bytes());
    }

    pub(crate) fn write_bytes(&self, relative: &str, bytes: &[u8]) {
        let path = self.path(relative);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    pub(crate) fn read(&self, relative: &str) -> String {
        fs::read_to_string(self.path(relative)).unwrap()
    }

    /// A function below `parent`, with registers in BARs 0 and 2.
    fn pci(&self, parent: &str, address: &str, class: u32) {
        let directory = format!("sys/devices/{parent}/{address}");
        self.write(&format!("{directory}/class"), &format!("{class:#08x}\n"));
        self.write(&format!("{directory}/vendor"), "0x8086\n");
        self.write(&format!("{directory}/device"), "0x0d93\n");
        self.write(&format!("{directory}/driver_override"), "(null)\n");
        self.write_bytes(&format!("{directory}/config"), &config());
        self.write_bytes(&format!("{directory}/resource0"), &[0; 0x1_0000]);
        self.write_bytes(&format!("{directory}/resource2"), &[0; 0x1000]);
        self.directory("sys/bus/pci/devices");
        let link = self.path(&format!("sys/bus/pci/devices/{address}"));
        symlink(Path::new("../../..").join(&directory[4..]), link).unwrap();
    }

    /// Lets `driver` have the function at `address`.
    pub(crate) fn drive(&self, address: &str, driver: &str) {
        self.undrive(address);
        let link = self.path(&format!("sys/bus/pci/devices/{address}/driver"));
        symlink(self.path(&format!("sys/bus/pci/drivers/{driver}")), link).unwrap();
    }

    pub(crate) fn undrive(&self, address: &str) {
        let link = self.path(&format!("sys/bus/pci/devices/{address}/driver"));
        let _ = fs::remove_file(link);
    }

    /// A DAX device over `range`, with its file in `/dev`.
    pub(crate) fn dax(&self, range: HpaWindow, driver: Option<&str>) {
        let directory = "sys/bus/dax/devices/dax0.0";
        self.write(
            &format!("{directory}/resource"),
            &format!("{:#x}\n", range.base.0),
        );
        self.write(&format!("{directory}/size"), &format!("{}\n", range.len));
        self.write(&format!("{directory}/align"), "2097152\n");
        if let Some(driver) = driver {
            let target = self.path(&format!("sys/bus/dax/drivers/{driver}"));
            fs::create_dir_all(&target).unwrap();
            symlink(target, self.path(&format!("{directory}/driver"))).unwrap();
        }
        fs::File::create(self.path("dev/dax0.0"))
            .and_then(|file| file.set_len(range.len))
            .unwrap();
    }

    /// Lets `driver` have the DAX device.
    pub(crate) fn drive_dax(&self, driver: &str) {
        let link = self.path("sys/bus/dax/devices/dax0.0/driver");
        let _ = fs::remove_file(&link);
        symlink(self.path(&format!("sys/bus/dax/drivers/{driver}")), link).unwrap();
    }

    /// Memory that comes in blocks of 128 MiB, of which new ones are `policy`.
    pub(crate) fn memory_blocks(&self, policy: &str) {
        let directory = "sys/devices/system/memory";
        self.write(&format!("{directory}/block_size_bytes"), "8000000\n");
        self.write(&format!("{directory}/auto_online_blocks"), policy);
    }
}

/// Configuration space with a Register Locator: component registers in BAR 0, device registers
/// in BAR 2.
fn config() -> Vec<u8> {
    let mut config = vec![0; 4096];
    for (offset, value) in [
        (0x100, 0x1101_0023_u32),
        (0x104, 0x03c1_1e98),
        (0x108, 0x0000_0000),
        (0x110, 0x0001_0023),
        (0x114, 0x0240_1e98),
        (0x118, 0x0000_0008),
        (0x11c, 0x0000_0100),
        (0x124, 0x0000_0302),
    ] {
        config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    config
}

/// One host bridge, 12, and a window over `targets`.
pub(crate) fn cedt(targets: &[u32]) -> Vec<u8> {
    let mut table = b"CEDT\0\0\0\0".to_vec();
    table.resize(36, 0);
    table.extend([0, 0, 32, 0, 12, 0, 0, 0]);
    table.resize(36 + 24, 0);
    table.extend(0x1_0000_u64.to_le_bytes());
    table.extend([1, 0, 36 + 4 * targets.len() as u8, 0, 0, 0, 0, 0]);
    table.extend(WINDOW.base.0.to_le_bytes());
    table.extend(WINDOW.len.to_le_bytes());
    table.extend([targets.len() as u8 - 1, 0, 0, 0, 0, 0, 0, 0, 0x0f, 0, 0, 0]);
    table.extend(targets.iter().flat_map(|uid| uid.to_le_bytes()));
    let len = table.len() as u32;
    table[4..8].copy_from_slice(&len.to_le_bytes());
    table
}
