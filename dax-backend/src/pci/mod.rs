//! CXL devices as PCI functions: found in sysfs, taken from the kernel's driver, mapped.

pub mod address;
pub mod config;
pub mod error;
pub mod registers;
pub mod sysfs;

pub use address::PciAddress;
pub use error::PciError;
pub use registers::MappedRegisters;
pub use sysfs::{PciFunction, Sysfs};
