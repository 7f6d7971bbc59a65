//! Why a device cannot be driven from user space, and what to do about it.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::PciAddress;

/// A PCI function that cannot be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PciError {
    /// There is nothing at this address.
    #[error("there is no PCI device {address}; {}", others(.known))]
    NoSuchDevice {
        /// What was asked for.
        address: PciAddress,
        /// The CXL memory devices that there are.
        known: Vec<PciAddress>,
    },
    /// There is something else at this address.
    #[error("{address} is no CXL memory device: its class is {class:#08x}, not 0x050210; {}", others(.known))]
    NotCxlMemory {
        /// What was asked for.
        address: PciAddress,
        /// Its class code.
        class: u32,
        /// The CXL memory devices that there are.
        known: Vec<PciAddress>,
    },
    /// It has no mailbox for fabric managers.
    #[error(
        "{address} has no mailbox for fabric managers: its class is {class:#08x}, and a switch's has 0x0c0b00, a CXL memory device 0x050210"
    )]
    NoMailbox {
        /// What was asked for.
        address: PciAddress,
        /// Its class code.
        class: u32,
    },
    /// A driver of the kernel has it.
    #[error(
        "{address} is driven by the kernel's {driver}: take it over with `dcm devices --bind {address}`, which ends that driver's use of it"
    )]
    KernelDriver {
        /// The device.
        address: PciAddress,
        /// The driver's name.
        driver: String,
    },
    /// No driver has it.
    #[error(
        "{address} is not bound to uio_pci_generic, which opens it to user space: `dcm devices --bind {address}`"
    )]
    NotBound {
        /// The device.
        address: PciAddress,
    },
    /// The driver for user space is not there.
    #[error(
        "the kernel's driver uio_pci_generic is not loaded: `modprobe uio_pci_generic` (CONFIG_UIO_PCI_GENERIC)"
    )]
    NoUioDriver,
    /// The kernel did not bind it.
    #[error(
        "{address} was offered to uio_pci_generic, and the kernel left it {}: dmesg may say why",
        .driver.as_ref().map_or("without a driver".to_owned(), |driver| format!("with {driver}"))
    )]
    NotTaken {
        /// The device.
        address: PciAddress,
        /// What drives it.
        driver: Option<String>,
    },
    /// Its configuration space does not say where its registers are.
    #[error("{address} has no {what} registers: its Register Locator does not name them")]
    NoRegisters {
        /// The device.
        address: PciAddress,
        /// Which block.
        what: &'static str,
    },
    /// The system does not allow it.
    #[error("{} may not be {what}: run as root, and with the kernel not locked down (/sys/kernel/security/lockdown)", .path.display())]
    NoRights {
        /// What was to be used.
        path: PathBuf,
        /// `read`, `written` or `mapped`.
        what: &'static str,
    },
    /// The system fails otherwise.
    #[error("{} cannot be {what}", .path.display())]
    Io {
        /// What was to be used.
        path: PathBuf,
        /// `read`, `written` or `mapped`.
        what: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

impl PciError {
    /// The error for `path` that was not `what` ("read").
    pub(crate) fn io(path: impl Into<PathBuf>, what: &'static str, source: io::Error) -> Self {
        let path = path.into();
        if source.kind() == io::ErrorKind::PermissionDenied {
            Self::NoRights { path, what }
        } else {
            Self::Io { path, what, source }
        }
    }
}

fn others(known: &[PciAddress]) -> String {
    if known.is_empty() {
        return "this machine has no CXL memory device".into();
    }
    let list: Vec<String> = known.iter().map(ToString::to_string).collect();
    format!("CXL memory devices here: {}", list.join(", "))
}
