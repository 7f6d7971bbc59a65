//! Device-DAX: `/dev/daxX.Y`, memory of the platform that programs can map
//! (Documentation/ABI/testing/sysfs-bus-dax).

#![forbid(unsafe_code)]

use std::fs;

use crate::address::{Hpa, HpaWindow};
use crate::pci::error::PciError;
use crate::pci::sysfs::{Sysfs, hex, link_name, write};

/// The kernel's driver that makes `/dev/daxX.Y`.
pub const DAX_DRIVER: &str = "device_dax";

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
