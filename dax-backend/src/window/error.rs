//! Why the host does not reach a device's memory, and what to do about it.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::cedt::BadCedt;
use crate::address::{Hpa, HpaWindow};
use crate::blocks::BlockError;
use crate::error::DecoderError;
use crate::pci::{PciAddress, PciError};

/// Memory that cannot be reached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WindowError {
    /// The firmware has no CXL windows.
    #[error(
        "{}: the firmware describes no CXL memory window; enable CXL in its setup (QEMU: -M q35,cxl=on and cxl-fmw)",
        .path.display()
    )]
    NoCedt {
        /// Where the table should be.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The firmware's table makes no sense.
    #[error(transparent)]
    BadCedt(#[from] BadCedt),
    /// No window leads to this device.
    #[error(
        "no memory window of the firmware leads to {address} alone: host bridge {bridge}, {windows} windows; interleaved windows are not supported"
    )]
    NoWindow {
        /// The device.
        address: PciAddress,
        /// Its host bridge, as the firmware numbers it.
        bridge: String,
        /// Windows that there are.
        windows: usize,
    },
    /// The window has no DAX device.
    #[error(
        "no /dev/daxX.Y covers the window at {:#x}+{:#x}: start the kernel with {}, which keeps it for programs (needs dax_hmem and device_dax)",
        .window.base.0, .window.len, memmap(.window, *.wanted)
    )]
    NoDax {
        /// The firmware's window.
        window: HpaWindow,
        /// Bytes that the device needs of it.
        wanted: u64,
    },
    /// The DAX devices are too small.
    #[error(
        "{name} has {:#x}+{:#x}, and the device needs {wanted:#x} bytes: start the kernel with {}",
        .has.base.0, .has.len, memmap(.window, *.wanted)
    )]
    DaxTooSmall {
        /// The largest one in the window.
        name: String,
        /// What it covers.
        has: HpaWindow,
        /// The firmware's window.
        window: HpaWindow,
        /// Bytes that the device needs of it.
        wanted: u64,
    },
    /// The DAX device is used otherwise.
    #[error(
        "{name} is memory of the system (driver {driver}): take it offline and free it with `daxctl reconfigure-device --mode=devdax --force {name}`"
    )]
    DaxInUse {
        /// Which.
        name: String,
        /// What has it.
        driver: String,
    },
    /// The DAX device cannot be mapped from where the extents begin.
    #[error(
        "{name} is mapped in multiples of {align:#x} bytes, and the DC regions begin at offset {offset:#x} in it"
    )]
    DaxAlign {
        /// Which.
        name: String,
        /// What it asks for.
        align: u64,
        /// Where the regions begin.
        offset: u64,
    },
    /// A switch lies between host and device.
    #[error(
        "{address} is behind a CXL switch, whose decoders have to be programmed by the firmware; they are not"
    )]
    BehindSwitch {
        /// The device.
        address: PciAddress,
    },
    /// The host bridge has to be programmed and cannot be reached.
    #[error("the host bridge's registers at {:#x} cannot be mapped through {}", .registers.0, .path.display())]
    NoBridgeRegisters {
        /// Where they are.
        registers: Hpa,
        /// What was mapped.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A decoder does not do it.
    #[error("{which} does not reach the DC regions")]
    Decoder {
        /// `the device's decoder` or `the host bridge's decoder`.
        which: &'static str,
        /// Why.
        #[source]
        source: DecoderError,
    },
    /// The kernel has no driver that makes memory of it.
    #[error(
        "the kernel's driver kmem, which makes {name} memory of a NUMA node, is not loaded: `modprobe kmem` (CONFIG_DEV_DAX_KMEM)"
    )]
    NoKmem {
        /// The DAX device.
        name: String,
    },
    /// The kernel did not make memory of it.
    #[error(
        "{name} was offered to kmem, and the kernel left it {}: dmesg may say why; the machine needs NUMA nodes",
        .driver.as_ref().map_or("without a driver".to_owned(), |driver| format!("with {driver}"))
    )]
    NotKmem {
        /// The DAX device.
        name: String,
        /// What has it.
        driver: Option<String>,
    },
    /// Its memory can't be put online block by block.
    #[error(transparent)]
    Blocks(#[from] BlockError),
    /// A file of the system.
    #[error(transparent)]
    System(#[from] PciError),
}

/// The kernel parameter that keeps `wanted` bytes of `window` for programs.
pub fn memmap(window: &HpaWindow, wanted: u64) -> String {
    let len = wanted.min(window.len).next_multiple_of(256 << 20);
    let (len, unit) = if len.is_multiple_of(1 << 30) {
        (len >> 30, 'G')
    } else {
        (len >> 20, 'M')
    };
    format!("memmap={len}{unit}%{:#x}+0xefffffff", window.base.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_parameter_has_the_numbers_of_this_machine() {
        let window = HpaWindow {
            base: Hpa(0x4_9000_0000),
            len: 8 << 30,
        };
        assert_eq!(memmap(&window, 4 << 30), "memmap=4G%0x490000000+0xefffffff");
        assert_eq!(
            memmap(&window, 300 << 20),
            "memmap=512M%0x490000000+0xefffffff"
        );
        assert_eq!(memmap(&window, 1 << 40), "memmap=8G%0x490000000+0xefffffff");
    }
}
