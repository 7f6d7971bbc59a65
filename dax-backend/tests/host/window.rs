//! The way to a device's memory, with the software device in place of the real one.

use std::os::fd::AsFd;

use dax_backend::address::{Hpa, HpaWindow};
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::error::DecoderError;
use dax_backend::mmio::{Mmio, RegisterBlock};
use dax_backend::model::{ModelConfig, ModelMmio, SoftwareDevice};
use dax_backend::window::WindowError;
use rustix::io::pread;

use crate::tree::{GIB, Tree, WINDOW, cedt, device};

/// A device with 1 GiB in one DC region, behind 512 MiB of static memory.
fn model() -> (SoftwareDevice, DcDevice<ModelMmio>) {
    let model = SoftwareDevice::new(ModelConfig::default()).unwrap();
    let driver = DcDevice::open(model.mmio(), DeviceConfig::default()).unwrap();
    (model, driver)
}

fn part(start: u64, len: u64) -> HpaWindow {
    HpaWindow {
        base: Hpa(WINDOW.base.0 + start),
        len,
    }
}

#[test]
fn dax_device_over_the_window_is_bound_and_opened() {
    let (tree, (model, mut driver)) = (Tree::new(), model());
    tree.dax(part(GIB, 2 * GIB), None);
    let window = tree.platform().reach(&mut driver, device()).unwrap();
    // The decoder is put where the DAX device is.
    assert_eq!(window.decoded.base, part(GIB, 0).base);
    assert_eq!(window.base, 0);
    assert!(!window.is_dev_mem);
    assert_eq!(
        model.decode(window.decoded.base),
        Some(driver.regions()[0].base)
    );
    assert_eq!(tree.read("sys/bus/dax/drivers/device_dax/new_id"), "dax0.0");
    assert_eq!(window.path, tree.path("dev/dax0.0"));
    let mut byte = [1];
    pread(window.file.as_fd(), &mut byte, window.base).unwrap();
}

#[test]
fn decoder_that_is_committed_stays_where_it_is() {
    let (tree, (_model, mut driver)) = (Tree::new(), model());
    tree.dax(part(0, 8 * GIB), Some("device_dax"));
    driver.program_decoder(part(3 * GIB, GIB)).unwrap();
    let window = tree.platform().reach(&mut driver, device()).unwrap();
    assert_eq!(window.base, 3 * GIB);
}

#[test]
fn missing_dax_device_is_told_with_the_kernel_parameter() {
    let (tree, (_model, mut driver)) = (Tree::new(), model());
    let error = tree.platform().reach(&mut driver, device()).unwrap_err();
    assert!(matches!(error, WindowError::NoDax { .. }));
    let told = error.to_string();
    assert!(told.contains("memmap=1G%0x490000000+0xefffffff"), "{told}");
    assert!(driver.decoded().unwrap().is_none(), "nothing was committed");
    // Asked for, /dev/mem does.
    let mut platform = tree.platform();
    platform.dev_mem = true;
    let window = platform.reach(&mut driver, device()).unwrap();
    assert!(window.is_dev_mem);
    assert_eq!(window.base, WINDOW.base.0);
}

#[test]
fn window_too_small_is_told_with_the_kernel_parameter() {
    let (tree, (_model, mut driver)) = (Tree::new(), model());
    tree.dax(part(0, GIB / 2), None);
    let error = tree.platform().reach(&mut driver, device()).unwrap_err();
    assert!(matches!(error, WindowError::DaxTooSmall { .. }));
    let told = error.to_string();
    assert!(
        told.contains("dax0.0") && told.contains("memmap=1G%0x490000000+0xefffffff"),
        "{told}"
    );
}

#[test]
fn memory_of_the_system_is_not_taken_from_it() {
    let (tree, (_model, mut driver)) = (Tree::new(), model());
    tree.dax(WINDOW, Some("kmem"));
    let error = tree.platform().reach(&mut driver, device()).unwrap_err();
    assert!(matches!(error, WindowError::DaxInUse { .. }));
    assert!(
        error.to_string().contains("daxctl reconfigure-device"),
        "{error}"
    );
}

#[test]
fn memory_of_a_node_is_the_kernel_s_block_by_block() {
    let (tree, (model, mut driver)) = (Tree::new(), model());
    tree.memory_blocks("offline\n");
    tree.dax(WINDOW, Some("device_dax"));
    tree.write("sys/bus/dax/devices/dax0.0/memmap_on_memory", "1\n");
    tree.write("sys/bus/dax/devices/dax0.0/target_node", "1\n");
    let node = |driver: &mut _| tree.platform().reach_as_node(driver, device());
    let error = node(&mut driver).unwrap_err();
    assert!(matches!(error, WindowError::NoKmem { .. }), "{error}");
    assert!(error.to_string().contains("modprobe kmem"), "{error}");
    tree.directory("sys/bus/dax/drivers/kmem");
    let error = node(&mut driver).unwrap_err();
    assert!(matches!(error, WindowError::NotKmem { .. }), "{error}");
    let told = |file: &str| tree.read(&format!("sys/bus/dax/drivers/{file}"));
    assert_eq!(told("device_dax/unbind"), "dax0.0");
    assert_eq!(told("kmem/new_id"), "dax0.0");

    // What the kernel keeps about the memory is not to be in it.
    assert_eq!(
        tree.read("sys/bus/dax/devices/dax0.0/memmap_on_memory"),
        "0"
    );
    // A file does not bind anything: here it is as if another start had.
    tree.drive_dax("kmem");
    let window = node(&mut driver).unwrap();
    assert_eq!((window.dax.as_str(), window.node), ("dax0.0", 1));
    assert_eq!(window.blocks.size(), 128 << 20);
    assert_eq!(
        model.decode(window.decoded.base),
        Some(driver.regions()[0].base)
    );
}

#[test]
fn memory_that_would_be_online_at_once_is_left_alone() {
    let (tree, (_model, mut driver)) = (Tree::new(), model());
    tree.dax(WINDOW, None);
    tree.directory("sys/bus/dax/drivers/kmem");
    let error = tree
        .platform()
        .reach_as_node(&mut driver, device())
        .unwrap_err();
    assert!(matches!(error, WindowError::Blocks(_)), "{error}");
    assert!(error.to_string().contains("CONFIG_MEMORY_HOTPLUG"));
    tree.memory_blocks("online\n");
    let error = tree
        .platform()
        .reach_as_node(&mut driver, device())
        .unwrap_err();
    let told = error.to_string();
    assert!(told.contains("memhp_default_state=offline"), "{told}");
    assert!(driver.decoded().unwrap().is_none(), "nothing was committed");
}

#[test]
fn firmware_without_a_window_for_the_device_is_told() {
    let (tree, (_model, mut driver)) = (Tree::new(), model());
    for targets in [&[13][..], &[12, 13]] {
        tree.write_bytes("sys/firmware/acpi/tables/CEDT", &cedt(targets));
        let error = tree.platform().reach(&mut driver, device()).unwrap_err();
        assert!(matches!(error, WindowError::NoWindow { .. }), "{error}");
    }
    tree.write_bytes("sys/firmware/acpi/tables/CEDT", b"nonsense");
    let error = tree.platform().reach(&mut driver, device()).unwrap_err();
    assert!(matches!(error, WindowError::BadCedt(_)), "{error}");
    std::fs::remove_file(tree.path("sys/firmware/acpi/tables/CEDT")).unwrap();
    let error = tree.platform().reach(&mut driver, device()).unwrap_err();
    assert!(matches!(error, WindowError::NoCedt { .. }), "{error}");
}

#[test]
fn host_bridge_out_of_reach_is_told_before_anything_is_committed() {
    let (tree, (_model, mut driver)) = (Tree::new(), model());
    tree.dax(WINDOW, None);
    std::fs::remove_file(tree.path("dev/mem")).unwrap();
    let error = tree.platform().reach(&mut driver, device()).unwrap_err();
    assert!(
        matches!(error, WindowError::NoBridgeRegisters { .. }),
        "{error}"
    );
    assert!(driver.decoded().unwrap().is_none());
}

/// A device whose decoders say that a commit has failed.
struct Refusing(ModelMmio);

impl Mmio for Refusing {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        self.0.block_len(block)
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        const COMMITTED: u32 = 1 << 10;
        const ERROR: u32 = 1 << 11;
        let value = self.0.read32(block, offset);
        let is_control =
            block == RegisterBlock::Component && value & (COMMITTED | 0x1000) == COMMITTED | 0x1000;
        if is_control {
            value & !COMMITTED | ERROR
        } else {
            value
        }
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        self.0.read64(block, offset)
    }

    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        self.0.write32(block, offset, value);
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        self.0.write64(block, offset, value);
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        self.0.read_payload(offset, payload);
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        self.0.write_payload(offset, payload);
    }
}

#[test]
fn refused_commit_is_told_with_the_decoder_and_its_register() {
    let tree = Tree::new();
    tree.dax(WINDOW, None);
    let model = SoftwareDevice::new(ModelConfig::default()).unwrap();
    let mut driver = DcDevice::open(Refusing(model.mmio()), DeviceConfig::default()).unwrap();
    let error = tree.platform().reach(&mut driver, device()).unwrap_err();
    let WindowError::Decoder { source, .. } = &error else {
        panic!("{error}");
    };
    assert!(
        matches!(source, DecoderError::CommitFailed { decoder: 0, .. }),
        "{source}"
    );
    assert!(source.to_string().contains("BDF/reset"), "{source}");
    assert_eq!(model.decode(WINDOW.base), None, "it is taken back");
}
