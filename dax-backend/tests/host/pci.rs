//! Devices in sysfs.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use dax_backend::mmio::{Mmio, RegisterBlock};
use dax_backend::pci::PciError;

use crate::tree::{DEVICE, DISK, Tree, device};

fn config32(tree: &Tree, offset: usize) -> u32 {
    let path = tree.path(&format!("sys/bus/pci/devices/{DEVICE}/config"));
    let bytes = fs::read(path).unwrap();
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

#[test]
fn cxl_devices_are_found_by_class() {
    let tree = Tree::new();
    let found = tree.sysfs().cxl_devices().unwrap();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].address, device());
    assert_eq!((found[0].vendor, found[0].device), (0x8086, 0x0d93));
    assert_eq!(found[0].driver.as_deref(), Some("uio_pci_generic"));
    let elsewhere = dax_backend::pci::Sysfs::new(tree.path("nowhere"));
    assert_eq!(elsewhere.cxl_devices().unwrap(), []);
}

#[test]
fn registers_are_mapped_and_the_device_enabled() {
    let tree = Tree::new();
    let registers = tree.sysfs().open(device()).unwrap();
    assert_eq!(registers.block_len(RegisterBlock::Component), 0x1_0000);
    assert_eq!(registers.block_len(RegisterBlock::Device), 0x1000);
    assert_eq!(config32(&tree, 4), 0x6, "memory space, bus master");
    assert_eq!(config32(&tree, 0x10c), 0x4, "CXL.mem");
}

#[test]
fn wrong_address_is_told_with_the_right_ones() {
    let tree = Tree::new();
    let error = tree
        .sysfs()
        .open("0000:7f:00.0".parse().unwrap())
        .unwrap_err();
    assert!(matches!(error, PciError::NoSuchDevice { .. }));
    assert_eq!(
        error.to_string(),
        "there is no PCI device 0000:7f:00.0; CXL memory devices here: 0000:0d:00.0"
    );
    let error = tree.sysfs().open(DISK.parse().unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "0000:00:1f.2 is no CXL memory device: its class is 0x010601, not 0x050210; \
         CXL memory devices here: 0000:0d:00.0"
    );
}

#[test]
fn bound_kernel_driver_is_told_and_left_alone() {
    let tree = Tree::new();
    tree.drive(DEVICE, "cxl_pci");
    let error = tree.sysfs().open(device()).unwrap_err();
    assert!(matches!(error, PciError::KernelDriver { .. }));
    let told = error.to_string();
    assert!(
        told.contains("cxl_pci") && told.contains("dcm devices --bind 0000:0d:00.0"),
        "{told}"
    );
    assert_eq!(config32(&tree, 4), 0, "nothing was touched");
    tree.undrive(DEVICE);
    let error = tree.sysfs().open(device()).unwrap_err();
    assert!(matches!(error, PciError::NotBound { .. }), "{error}");
}

#[test]
fn binding_asks_the_kernel_and_believes_only_the_result() {
    let tree = Tree::new();
    tree.drive(DEVICE, "cxl_pci");
    let sysfs = tree.sysfs();
    // Nobody acts on what is written here.
    let error = sysfs
        .bind(&sysfs.cxl_device(device()).unwrap())
        .unwrap_err();
    assert!(
        matches!(&error, PciError::NotTaken { driver: Some(driver), .. } if driver == "cxl_pci"),
        "{error}"
    );
    let function = format!("sys/bus/pci/devices/{DEVICE}");
    assert_eq!(
        tree.read(&format!("{function}/driver_override")),
        "uio_pci_generic"
    );
    assert_eq!(tree.read("sys/bus/pci/drivers/cxl_pci/unbind"), DEVICE);
    assert_eq!(tree.read("sys/bus/pci/drivers_probe"), DEVICE);
    fs::remove_dir(tree.path("sys/bus/pci/drivers/uio_pci_generic")).unwrap();
    let error = sysfs
        .bind(&sysfs.cxl_device(device()).unwrap())
        .unwrap_err();
    assert!(
        error.to_string().contains("modprobe uio_pci_generic"),
        "{error}"
    );
}

#[test]
fn device_without_a_register_locator_is_told() {
    let tree = Tree::new();
    let config = format!("sys/bus/pci/devices/{DEVICE}/config");
    tree.write_bytes(&config, &[0; 4096]);
    let error = tree.sysfs().open(device()).unwrap_err();
    assert!(
        matches!(
            error,
            PciError::NoRegisters {
                what: "component",
                ..
            }
        ),
        "{error}"
    );
}

/// As a user who is not root sees it: 64 bytes of configuration space, and no writing.
#[test]
fn missing_rights_are_told_with_the_way_out() {
    use rustix::process::{Uid, geteuid};
    let tree = Tree::new();
    let config = tree.path(&format!("sys/bus/pci/devices/{DEVICE}/config"));
    fs::set_permissions(&config, PermissionsExt::from_mode(0o444)).unwrap();
    if geteuid().is_root() {
        fs::set_permissions(tree.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    }
    // Rights belong to a thread, so one of its own goes without.
    let error = std::thread::scope(|scope| {
        let opening = scope.spawn(|| {
            if geteuid().is_root() {
                rustix::thread::set_thread_uid(Uid::from_raw(65534)).unwrap();
            }
            tree.sysfs().open(device()).unwrap_err()
        });
        opening.join().unwrap()
    });
    assert!(matches!(error, PciError::NoRights { .. }), "{error:?}");
    assert!(error.to_string().contains("run as root"), "{error}");
}
