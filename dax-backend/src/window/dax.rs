//! Device-DAX: `/dev/daxX.Y`, memory of the platform that programs can map
//! (Documentation/ABI/testing/sysfs-bus-dax).

#![forbid(unsafe_code)]

use std::fs;

use super::error::WindowError;
use crate::address::{Hpa, HpaWindow};
use crate::pci::error::PciError;
use crate::pci::sysfs::{Sysfs, hex, link_name, write};

/// The kernel's driver that makes `/dev/daxX.Y`.
pub const DAX_DRIVER: &str = "device_dax";

/// The kernel's driver that makes memory of a NUMA node.
pub const KMEM_DRIVER: &str = "kmem";

/// A DAX device, as sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaxDevice {
    /// Such as `dax0.0`.
    pub name: String,
    /// Host addresses that it maps.
    pub range: HpaWindow,
    /// What addresses and lengths of mappings are multiples of, in bytes.
    pub align: u64,
    /// The driver that has it: `device_dax`, `kmem` if it is memory of the system, or none.
    pub driver: Option<String>,
}

impl DaxDevice {
    /// Whether all of `range` is in it.
    pub fn covers(&self, range: &HpaWindow) -> bool {
        self.range.base <= range.base && range.end() <= self.range.end()
    }

    /// Whether any byte of it is in `range`.
    pub fn touches(&self, range: &HpaWindow) -> bool {
        self.range.base < range.end() && range.base < self.range.end()
    }
}

/// All DAX devices whose addresses can be seen, in the order of their addresses.
///
/// # Errors
/// [`PciError::NoRights`]: only root sees the addresses.
pub fn devices(sysfs: &Sysfs) -> Result<Vec<DaxDevice>, PciError> {
    let Ok(entries) = fs::read_dir(sysfs.path("bus/dax/devices")) else {
        // A kernel without the bus, or with nothing on it.
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        if let Some(device) = device(sysfs, &entry.file_name().to_string_lossy())? {
            found.push(device);
        }
    }
    found.sort_by_key(|device| device.range.base);
    Ok(found)
}

/// The DAX device `name`; `None` if it has no size.
fn device(sysfs: &Sysfs, name: &str) -> Result<Option<DaxDevice>, PciError> {
    let directory = sysfs.path("bus/dax/devices").join(name);
    let decimal = |attribute: &str| {
        let text = fs::read_to_string(directory.join(attribute)).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or_default()
    };
    let len = decimal("size");
    if len == 0 {
        return Ok(None);
    }
    Ok(Some(DaxDevice {
        range: HpaWindow {
            base: Hpa(hex(&directory.join("resource"))?),
            len,
        },
        align: decimal("align").max(4096),
        driver: link_name(&directory.join("driver")),
        name: name.to_owned(),
    }))
}

/// Gives `device` to the driver that makes `/dev/daxX.Y`, if no driver has it.
///
/// # Errors
/// [`PciError`]; memory that the system uses (`kmem`) is not taken away from it.
pub fn bind(sysfs: &Sysfs, device: &DaxDevice) -> Result<(), PciError> {
    if device.driver.is_some() {
        return Ok(());
    }
    let driver = sysfs.path("bus/dax/drivers").join(DAX_DRIVER);
    // A name that the driver knows already is refused here, and taken there.
    if let Err(error) = write(&driver.join("new_id"), &device.name) {
        write(&driver.join("bind"), &device.name).map_err(|_| error)?;
    }
    Ok(())
}

/// Gives `device` to the driver that makes memory of a NUMA node of it, and takes it from the one
/// that makes `/dev/daxX.Y`; the node's number.
///
/// # Errors
/// [`WindowError::NoKmem`], [`WindowError::NotKmem`], [`WindowError::DaxInUse`] for any other driver.
pub fn bind_kmem(sysfs: &Sysfs, device: &DaxDevice) -> Result<u32, WindowError> {
    let name = &device.name;
    let directory = sysfs.path("bus/dax/devices").join(name);
    let drivers = sysfs.path("bus/dax/drivers");
    let kmem = drivers.join(KMEM_DRIVER);
    if !kmem.exists() {
        return Err(WindowError::NoKmem { name: name.clone() });
    }
    match device.driver.as_deref() {
        Some(KMEM_DRIVER) => {}
        Some(DAX_DRIVER) => {
            write(&drivers.join(DAX_DRIVER).join("unbind"), name)?;
            // It may have been bound without being named there.
            let _ = write(&drivers.join(DAX_DRIVER).join("remove_id"), name);
        }
        Some(driver) => {
            return Err(WindowError::DaxInUse {
                name: name.clone(),
                driver: driver.to_owned(),
            });
        }
        None => {}
    }
    if device.driver.as_deref() != Some(KMEM_DRIVER) {
        // What describes the memory would lie in it, accepted or not. Older kernels don't do that.
        let on_memory = directory.join("memmap_on_memory");
        if fs::read_to_string(&on_memory).is_ok_and(|set| set.trim() == "1") {
            write(&on_memory, "0")?;
        }
        if let Err(error) = write(&kmem.join("new_id"), name) {
            write(&kmem.join("bind"), name).map_err(|_| error)?;
        }
    }
    let driver = link_name(&directory.join("driver"));
    if driver.as_deref() != Some(KMEM_DRIVER) {
        return Err(WindowError::NotKmem {
            name: name.clone(),
            driver,
        });
    }
    let node = fs::read_to_string(directory.join("target_node")).unwrap_or_default();
    node.trim().parse().map_err(|_| WindowError::NotKmem {
        name: name.clone(),
        driver,
    })
}
