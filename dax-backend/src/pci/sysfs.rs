//! PCI functions in sysfs (Documentation/ABI/testing/sysfs-bus-pci).

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::config::{ConfigSpace, enable, port_number, register_blocks};
use super::{MappedRegisters, PciAddress, PciError};
use crate::mmio::RegisterBlock;

/// Class code of a CXL memory device: memory controller, CXL, interface 10h (CXL r3.1 8.1.12.1).
pub const CXL_MEMORY: u32 = 0x05_0210;
/// Class code of a switch's mailbox for fabric managers: serial bus controller, CXL (CXL r3.1 7.2.9).
pub const SWITCH_MAILBOX: u32 = 0x0c_0b00;
/// The kernel's driver that leaves a function to user space.
pub const UIO_DRIVER: &str = "uio_pci_generic";

/// The root of a sysfs tree, `/sys` of this machine or of another one.
#[derive(Clone, Debug)]
pub struct Sysfs {
    root: PathBuf,
}

/// A PCI function, as sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciFunction {
    /// Where it is.
    pub address: PciAddress,
    /// Class code: base class, subclass, programming interface.
    pub class: u32,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// The driver that has it.
    pub driver: Option<String>,
}

impl Default for Sysfs {
    fn default() -> Self {
        Self::new("/sys")
    }
}

impl Sysfs {
    /// The tree at `root`.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// `relative` in the tree.
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.root.join(relative)
    }

    fn directory(&self, address: PciAddress) -> PathBuf {
        self.path("bus/pci/devices").join(address.to_string())
    }

    /// All CXL memory devices, in the order of their addresses.
    ///
    /// # Errors
    /// [`PciError::Io`]
    pub fn cxl_devices(&self) -> Result<Vec<PciFunction>, PciError> {
        let path = self.path("bus/pci/devices");
        let entries = match fs::read_dir(&path) {
            // A machine without PCI.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|error| PciError::io(&path, "read", error))?,
        };
        let mut found: Vec<PciFunction> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter_map(|address| self.function(address).ok())
            .filter(|function| function.class == CXL_MEMORY)
            .collect();
        found.sort_by_key(|function| function.address);
        Ok(found)
    }

    /// The CXL memory device at `address`.
    ///
    /// # Errors
    /// [`PciError::NoSuchDevice`], [`PciError::NotCxlMemory`], [`PciError::Io`]
    pub fn cxl_device(&self, address: PciAddress) -> Result<PciFunction, PciError> {
        let known = || {
            let devices = self.cxl_devices().unwrap_or_default();
            devices.iter().map(|device| device.address).collect()
        };
        if !self.directory(address).exists() {
            return Err(PciError::NoSuchDevice {
                address,
                known: known(),
            });
        }
        let function = self.function(address)?;
        if function.class != CXL_MEMORY {
            return Err(PciError::NotCxlMemory {
                address,
                class: function.class,
                known: known(),
            });
        }
        Ok(function)
    }

    /// The CXL memory device at `address`, or the mailbox that a switch has there for fabric
    /// managers.
    ///
    /// # Errors
    /// As [`cxl_device`](Self::cxl_device).
    pub fn cxl_function(&self, address: PciAddress) -> Result<PciFunction, PciError> {
        match self.function(address) {
            Ok(function) if function.class == SWITCH_MAILBOX => Ok(function),
            _ => self.cxl_device(address),
        }
    }

    fn function(&self, address: PciAddress) -> Result<PciFunction, PciError> {
        let directory = self.directory(address);
        let number = |name: &str| hex(&directory.join(name));
        Ok(PciFunction {
            address,
            class: number("class")? as u32,
            vendor: number("vendor")? as u16,
            device: number("device")? as u16,
            driver: link_name(&directory.join("driver")),
        })
    }

    /// Takes `function` from whatever driver has it, and gives it to `uio_pci_generic`.
    /// The override stays until the next start of the machine.
    ///
    /// # Errors
    /// [`PciError`]; once the old driver has let go, the device may be left without one.
    pub fn bind(&self, function: &PciFunction) -> Result<(), PciError> {
        if function.driver.as_deref() == Some(UIO_DRIVER) {
            return Ok(());
        }
        if !self.path("bus/pci/drivers").join(UIO_DRIVER).exists() {
            return Err(PciError::NoUioDriver);
        }
        let address = function.address;
        let directory = self.directory(address);
        write(&directory.join("driver_override"), UIO_DRIVER)?;
        if function.driver.is_some() {
            write(&directory.join("driver/unbind"), &address.to_string())?;
        }
        write(&self.path("bus/pci/drivers_probe"), &address.to_string())?;
        let driver = self.function(address)?.driver;
        if driver.as_deref() == Some(UIO_DRIVER) {
            Ok(())
        } else {
            Err(PciError::NotTaken { address, driver })
        }
    }

    /// Maps the registers of the CXL memory device at `address`, which has to be bound already.
    ///
    /// # Errors
    /// [`PciError`]
    pub fn open(&self, address: PciAddress) -> Result<MappedRegisters, PciError> {
        let function = self.cxl_device(address)?;
        self.map(
            &function,
            &[
                (RegisterBlock::Component, "component"),
                (RegisterBlock::Device, "device"),
            ],
        )
    }

    /// Maps the registers of a mailbox for fabric managers: of a CXL memory device, or of the
    /// function at `address` that a switch has for it. It has to be bound already.
    ///
    /// # Errors
    /// [`PciError`]
    pub fn open_mailbox(&self, address: PciAddress) -> Result<MappedRegisters, PciError> {
        let function = self.cxl_function(address).map_err(|error| match error {
            PciError::NotCxlMemory { class, .. } => PciError::NoMailbox { address, class },
            error => error,
        })?;
        self.map(&function, &[(RegisterBlock::Device, "device")])
    }

    /// Maps `wanted` of what is bound to `uio_pci_generic`.
    fn map(
        &self,
        function: &PciFunction,
        wanted: &[(RegisterBlock, &'static str)],
    ) -> Result<MappedRegisters, PciError> {
        let address = function.address;
        match function.driver.clone() {
            Some(driver) if driver == UIO_DRIVER => {}
            Some(driver) => return Err(PciError::KernelDriver { address, driver }),
            None => return Err(PciError::NotBound { address }),
        }
        let directory = self.directory(address);
        let path = directory.join("config");
        let mut config = ConfigFile::open(&path)?;
        enable(&mut config).map_err(|error| PciError::io(&path, "written", error))?;
        let blocks =
            register_blocks(&mut config).map_err(|error| PciError::io(&path, "read", error))?;
        let mut registers = MappedRegisters::default();
        for &(block, what) in wanted {
            let location = blocks.iter().find(|location| location.block == block);
            let location = location.ok_or(PciError::NoRegisters { address, what })?;
            let path = directory.join(format!("resource{}", location.bar));
            let failed = |error| PciError::io(&path, "mapped", error);
            let file = read_write(&path).map_err(failed)?;
            // A map longer than the BAR is refused.
            let len = file.metadata().map_err(failed)?.len() as usize;
            registers
                .map(block, &file, 0, len, location.offset)
                .map_err(failed)?;
        }
        Ok(registers)
    }

    /// The functions above `address`, from its port up to the root port.
    ///
    /// # Errors
    /// [`PciError::Io`]
    pub fn ports_above(&self, address: PciAddress) -> Result<Vec<PciAddress>, PciError> {
        let path = self.directory(address);
        let real = fs::canonicalize(&path).map_err(|error| PciError::io(&path, "read", error))?;
        let parts = real
            .ancestors()
            .skip(1)
            .map_while(|part| part.file_name()?.to_str()?.parse().ok());
        Ok(parts.collect())
    }

    /// The unique id that ACPI gives the host bridge above `address`: what the CEDT names it by.
    /// `None` if sysfs does not tell.
    pub fn host_bridge_uid(&self, address: PciAddress) -> Option<u32> {
        let real = fs::canonicalize(self.directory(address)).ok()?;
        let bridge = real.ancestors().find(|part| {
            let name = part.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("pci"))
        })?;
        let uid = fs::read_to_string(bridge.join("firmware_node/uid")).ok()?;
        uid.trim().parse().ok()
    }

    /// The port number of the port at `address`.
    ///
    /// # Errors
    /// [`PciError::Io`], [`PciError::NoRights`]
    pub fn port_number(&self, address: PciAddress) -> Result<Option<u8>, PciError> {
        let path = self.directory(address).join("config");
        let mut config = ConfigFile::open(&path)?;
        port_number(&mut config).map_err(|error| PciError::io(&path, "read", error))
    }
}

/// The file `config` of a function.
struct ConfigFile(File);

impl ConfigFile {
    fn open(path: &Path) -> Result<Self, PciError> {
        let opened = read_write(path).map_err(|error| PciError::io(path, "written", error));
        opened.map(Self)
    }
}

impl ConfigSpace for ConfigFile {
    fn read32(&mut self, offset: u16) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.0.read_exact_at(&mut bytes, offset.into())?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn write32(&mut self, offset: u16, value: u32) -> io::Result<()> {
        self.0.write_all_at(&value.to_le_bytes(), offset.into())
    }
}

fn read_write(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Writes an attribute.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), PciError> {
    fs::write(path, text).map_err(|error| PciError::io(path, "written", error))
}

/// Reads an attribute that is a number, in hex with or without `0x`.
pub(crate) fn hex(path: &Path) -> Result<u64, PciError> {
    let failed = |error| PciError::io(path, "read", error);
    let text = fs::read_to_string(path).map_err(failed)?;
    u64::from_str_radix(text.trim().trim_start_matches("0x"), 16)
        .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))
}

/// The last part of what a link leads to.
pub(crate) fn link_name(path: &Path) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}
