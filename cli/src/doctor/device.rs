//! CXL devices: what stands between each and `dcm serve --device`.
#![forbid(unsafe_code)]

use dax_backend::address::HpaWindow;
use dax_backend::pci::sysfs::UIO_DRIVER;
use dax_backend::pci::{PciError, PciFunction};
use dax_backend::window::dax::{self, DAX_DRIVER, DaxDevice, KMEM_DRIVER};
use dax_backend::window::{Platform, WindowError, memmap};

use super::finding::Finding;
use super::machine::boot_with;
use crate::size::Bytes;

/// Everything about the devices of a machine; nothing of one that has none.
pub(super) fn look(platform: &Platform) -> Vec<Finding> {
    let devices = match platform.sysfs.cxl_devices() {
        Ok(devices) if devices.is_empty() => {
            let found = "none; dcm serve --emulate 1G is one in software";
            return vec![Finding::ok("CXL device", found)];
        }
        Ok(devices) => devices,
        Err(error) => return vec![failed("CXL device", &error)],
    };
    let mut findings = Vec::new();
    for device in &devices {
        findings.push(driver(platform, device));
        findings.push(window(platform, device));
    }
    findings
}

fn failed(what: &'static str, error: &(dyn std::error::Error + 'static)) -> Finding {
    let follows = "what is there can't be seen";
    Finding::missing(what, error.to_string(), follows).mend("sudo dcm doctor")
}

/// Who drives its registers.
fn driver(platform: &Platform, device: &PciFunction) -> Finding {
    let (what, address) = ("CXL device", device.address);
    let bind = format!("sudo dcm devices --bind {address}");
    let uio = platform.sysfs.path("bus/pci/drivers").join(UIO_DRIVER);
    match device.driver.as_deref() {
        Some(UIO_DRIVER) => Finding::ok(what, format!("{address} on {UIO_DRIVER}")),
        other => {
            let found = match other {
                Some(driver) => format!("{address}, driven by the kernel's {driver}"),
                None => format!("{address}, without a driver"),
            };
            let follows = "dcm serve --device reaches its registers through uio_pci_generic";
            let mend = match uio.exists() {
                true => bind,
                false => format!("sudo modprobe {UIO_DRIVER} && {bind}"),
            };
            Finding::missing(what, found, follows).mend(mend)
        }
    }
}

/// Who has the memory behind it.
fn window(platform: &Platform, device: &PciFunction) -> Finding {
    let (what, address) = ("CXL window", device.address);
    let windows = match platform.windows_to(device.address) {
        Ok(windows) => windows,
        Err(WindowError::System(error @ PciError::NoRights { .. })) => return failed(what, &error),
        Err(error) => {
            let follows = "the platform gives programs no way to the device's memory";
            return Finding::missing(what, error.to_string(), follows);
        }
    };
    let all = match dax::devices(&platform.sysfs) {
        Ok(all) => all,
        Err(error) => return failed(what, &error),
    };
    let inside = |device: &&DaxDevice| windows.iter().any(|window| device.touches(window));
    let Some(found) = all.iter().filter(inside).max_by_key(|dax| dax.range.len) else {
        let window = windows[0];
        return Finding::missing(
            what,
            format!("{}, and no /dev/daxX.Y over it", place(&window)),
            "programs can't map it: the kernel has to be told to keep it for them",
        )
        .mend(boot_with(&memmap(&window, window.len)));
    };
    let there = format!("{} of {} for {address}", found.name, place(&found.range));
    match found.driver.as_deref() {
        Some(DAX_DRIVER) => Finding::ok(what, there),
        Some(KMEM_DRIVER) => Finding::ok(
            what,
            format!("{there}, memory of a NUMA node: dcm serve --surface node"),
        ),
        // dcm serve binds it.
        None if platform
            .sysfs
            .path("bus/dax/drivers")
            .join(DAX_DRIVER)
            .exists() =>
        {
            Finding::ok(what, there)
        }
        _ => Finding::missing(
            what,
            format!("{there}, without a driver for it"),
            "programs map the memory through /dev/daxX.Y, which device_dax makes",
        )
        .mend("sudo modprobe device_dax"),
    }
}

fn place(range: &HpaWindow) -> String {
    format!("{} at {:#x}", Bytes(range.len), range.base.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;
    use dax_backend::pci::Sysfs;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    const ADDRESS: &str = "0000:0d:00.0";

    /// A device of class 0502, and one host bridge with a window of 8 GiB.
    fn machine() -> (tempfile::TempDir, Platform) {
        let root = tempfile::tempdir().unwrap();
        let device = root.path().join("bus/pci/devices").join(ADDRESS);
        fs::create_dir_all(&device).unwrap();
        for (name, text) in [
            ("class", "0x050210\n"),
            ("vendor", "0x8086\n"),
            ("device", "0x0d93\n"),
        ] {
            fs::write(device.join(name), text).unwrap();
        }
        fs::create_dir_all(root.path().join("firmware/acpi/tables")).unwrap();
        let mut table = b"CEDT\0\0\0\0".to_vec();
        table.resize(36, 0);
        table.extend([0, 0, 32, 0, 12, 0, 0, 0]);
        table.resize(36 + 24, 0);
        table.extend(0x1_0000_u64.to_le_bytes());
        table.extend([1, 0, 40, 0, 0, 0, 0, 0]);
        table.extend(0x4_9000_0000_u64.to_le_bytes());
        table.extend((8_u64 << 30).to_le_bytes());
        table.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x0f, 0, 0, 0, 12, 0, 0, 0]);
        let len = table.len() as u32;
        table[4..8].copy_from_slice(&len.to_le_bytes());
        fs::write(root.path().join("firmware/acpi/tables/CEDT"), table).unwrap();
        let platform = Platform {
            sysfs: Sysfs::new(root.path()),
            ..Platform::default()
        };
        (root, platform)
    }

    fn drive(root: &Path, bus: &str, device: &str, driver: &str) {
        let target = root.join(format!("bus/{bus}/drivers/{driver}"));
        fs::create_dir_all(&target).unwrap();
        let link = root.join(format!("bus/{bus}/devices/{device}/driver"));
        let _ = fs::remove_file(&link);
        symlink(target, link).unwrap();
    }

    fn mends(platform: &Platform) -> Vec<Option<String>> {
        let findings = look(platform);
        let missing = |f: &Finding| (f.verdict == Verdict::Missing) == f.mend.is_some();
        assert!(findings.iter().all(missing), "{findings:#?}");
        findings.into_iter().map(|finding| finding.mend).collect()
    }

    #[test]
    fn each_lack_of_a_device_has_its_command() {
        let (root, platform) = machine();
        let found = mends(&platform);
        let driver = found[0].as_deref().unwrap();
        assert!(driver.contains("modprobe uio_pci_generic"), "{driver}");
        let window = found[1].as_deref().unwrap();
        let parameter = "memmap=8G%0x490000000+0xefffffff";
        assert!(window.contains(parameter), "{window}");
        drive(root.path(), "pci", ADDRESS, "cxl_pci");
        fs::create_dir_all(root.path().join("bus/pci/drivers/uio_pci_generic")).unwrap();
        let driver = mends(&platform)[0].clone();
        let bind = format!("sudo dcm devices --bind {ADDRESS}");
        assert_eq!(driver.as_deref(), Some(bind.as_str()));

        drive(root.path(), "pci", ADDRESS, UIO_DRIVER);
        let dax = root.path().join("bus/dax/devices/dax0.0");
        fs::create_dir_all(&dax).unwrap();
        fs::write(dax.join("resource"), "0x490000000\n").unwrap();
        fs::write(dax.join("size"), "4294967296\n").unwrap();
        assert_eq!(
            mends(&platform)[1].as_deref(),
            Some("sudo modprobe device_dax")
        );
        for driver in [DAX_DRIVER, KMEM_DRIVER] {
            drive(root.path(), "dax", "dax0.0", driver);
            assert_eq!(mends(&platform), [None, None]);
        }
    }

    #[test]
    fn a_machine_without_a_device_or_a_window_is_told_so() {
        let (root, platform) = machine();
        fs::remove_file(root.path().join("firmware/acpi/tables/CEDT")).unwrap();
        let findings = look(&platform);
        assert_eq!(findings[1].verdict, Verdict::Missing);
        assert!(findings[1].found.contains("enable CXL in its setup"));
        fs::remove_dir_all(root.path().join("bus/pci/devices")).unwrap();
        let findings = look(&platform);
        assert!(matches!(&findings[..], [only] if only.verdict == Verdict::Ok));
    }
}
