//! The host's way to a device's memory: the firmware's window, the decoders on the way, and the
//! file that programs map.
//!
//! A window lies outside of every BAR, so no driver of the PCI function gives it to programs.
//! Device-DAX does, with page structures and 2 MiB mappings, for addresses that the kernel was
//! told to keep (`memmap=…+0xefffffff`).
#![forbid(unsafe_code)]

pub mod cedt;
pub mod dax;
pub mod error;

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::address::{Hpa, HpaWindow};
use crate::blocks::MemoryBlocks;
use crate::device::DcDevice;
use crate::error::DecoderError;
use crate::hdm::{DecodedWindow, Decoders};
use crate::mmio::{Mmio, RegisterBlock};
use crate::pci::{MappedRegisters, PciAddress, PciError, Sysfs};
use crate::regs::hdm_decoder::GRANULARITY;
use cedt::{Cedt, HostBridge};
use dax::{DAX_DRIVER, DaxDevice};
pub use error::{WindowError, memmap};

/// Where this machine's memory windows are found.
#[derive(Clone, Debug)]
pub struct Platform {
    /// The sysfs tree.
    pub sysfs: Sysfs,
    /// Where device files are.
    pub dev: PathBuf,
    /// Whether `/dev/mem` may serve where there is no DAX device. Whoever may map the window can
    /// map all of the machine's memory then.
    pub dev_mem: bool,
}

impl Default for Platform {
    fn default() -> Self {
        Self {
            sysfs: Sysfs::default(),
            dev: "/dev".into(),
            dev_mem: false,
        }
    }
}

/// A device's memory as a file.
#[derive(Debug)]
pub struct WindowFile {
    /// `/dev/daxX.Y`, or `/dev/mem`.
    pub file: OwnedFd,
    /// Its path.
    pub path: PathBuf,
    /// Where the lowest DC region begins in it, in bytes.
    pub base: u64,
    /// What decodes there.
    pub decoded: DecodedWindow,
    /// Whether it is `/dev/mem`: whoever gets it can map all of this machine's memory, O_DIRECT
    /// and registered buffers fail on it.
    pub is_dev_mem: bool,
}

impl Platform {
    /// The firmware's table.
    ///
    /// # Errors
    /// [`WindowError::NoCedt`], [`WindowError::BadCedt`], [`PciError::NoRights`]
    pub fn cedt(&self) -> Result<Cedt, WindowError> {
        let path = self.sysfs.path("firmware/acpi/tables/CEDT");
        let table = fs::read(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => WindowError::NoCedt {
                path: path.clone(),
                source,
            },
            _ => PciError::io(&path, "read", source).into(),
        })?;
        Ok(Cedt::parse(&table)?)
    }

    /// Makes the memory of `device`, which is at `address`, reachable: programs what decoders
    /// there are on the way, binds the DAX device and opens it.
    ///
    /// # Errors
    /// [`WindowError`]; nothing is opened then, but decoders may be committed.
    pub fn reach<M: Mmio>(
        &self,
        device: &mut DcDevice<M>,
        address: PciAddress,
    ) -> Result<WindowFile, WindowError> {
        let route = self.route(address)?;
        let devices = dax::devices(&self.sysfs)?;
        let decoded = self.decode(device, address, &route, &devices)?;
        self.open(&route, &devices, decoded, device.decode_span().len)
    }

    /// As [`reach`](Self::reach), but makes the memory of `device` the kernel's: gives the DAX
    /// device over it to `kmem`, whose memory blocks are all offline at first.
    ///
    /// # Errors
    /// [`WindowError`]; nothing is the kernel's then, but decoders may be committed.
    pub fn reach_as_node<M: Mmio>(
        &self,
        device: &mut DcDevice<M>,
        address: PciAddress,
    ) -> Result<NodeWindow, WindowError> {
        let blocks = MemoryBlocks::of(&self.sysfs)?;
        blocks.check_policy()?;
        let route = self.route(address)?;
        let devices = dax::devices(&self.sysfs)?;
        // Never /dev/mem: that gives the kernel no memory.
        let strict = Self {
            dev_mem: false,
            ..self.clone()
        };
        let decoded = strict.decode(device, address, &route, &devices)?;
        let wanted = device.decode_span().len;
        let dax = Self::covering(&route, &devices, &decoded, wanted)?;
        let node = dax::bind_kmem(&self.sysfs, dax)?;
        Ok(NodeWindow {
            blocks,
            dax: dax.name.clone(),
            node,
            decoded,
        })
    }

    /// The firmware's windows that lead to the device at `address` alone.
    ///
    /// # Errors
    /// [`WindowError::NoCedt`], [`WindowError::BadCedt`], [`WindowError::NoWindow`],
    /// [`PciError::NoRights`]
    pub fn windows_to(&self, address: PciAddress) -> Result<Vec<HpaWindow>, WindowError> {
        Ok(self.route(address)?.windows)
    }

    /// Where the device's memory is found, after what decoders need for it.
    fn decode<M: Mmio>(
        &self,
        device: &mut DcDevice<M>,
        address: PciAddress,
        route: &Route,
        devices: &[DaxDevice],
    ) -> Result<DecodedWindow, WindowError> {
        let decoder = |source| WindowError::Decoder {
            which: "the device's decoder",
            source,
        };
        // What an earlier driver or the firmware has committed stays.
        if let Some(decoded) = device.decoded().map_err(decoder)? {
            return Ok(decoded);
        }
        let window = self.choose(route, devices, device.decode_span().len)?;
        // First, so that what fails here is tried again by the next start.
        self.program_bridge(route, address, window)?;
        device.program_decoder(window).map_err(decoder)
    }

    /// The DAX device that has all of `decoded`.
    fn covering<'a>(
        route: &Route,
        devices: &'a [DaxDevice],
        decoded: &DecodedWindow,
        wanted: u64,
    ) -> Result<&'a DaxDevice, WindowError> {
        let range = HpaWindow {
            base: decoded.base,
            len: decoded.dpa.len,
        };
        let device = devices.iter().find(|device| device.covers(&range));
        device.ok_or_else(|| {
            let mut windows = route.windows.iter();
            let window = windows.find(|window| window.base <= range.base);
            WindowError::NoDax {
                window: *window.unwrap_or(&route.windows[0]),
                wanted,
            }
        })
    }

    /// The windows that lead to the device at `address`, and its host bridge.
    fn route(&self, address: PciAddress) -> Result<Route, WindowError> {
        let cedt = self.cedt()?;
        let uid = self.sysfs.host_bridge_uid(address);
        let only = match cedt.bridges[..] {
            [bridge] => Some(bridge.uid),
            _ => None,
        };
        let found = uid.or(only);
        let suits = |window: &&cedt::FixedWindow| found.is_some_and(|uid| window.suits(uid));
        let windows: Vec<HpaWindow> = cedt.windows.iter().filter(suits).map(|w| w.range).collect();
        if windows.is_empty() {
            return Err(WindowError::NoWindow {
                address,
                bridge: found.map_or("unknown".into(), |uid| uid.to_string()),
                windows: cedt.windows.len(),
            });
        }
        let bridge = cedt.bridges.iter().find(|bridge| Some(bridge.uid) == found);
        Ok(Route {
            windows,
            bridge: bridge.copied(),
        })
    }

    /// Which part of the windows the device's decoder is to decode: where a DAX device is.
    fn choose(
        &self,
        route: &Route,
        devices: &[DaxDevice],
        wanted: u64,
    ) -> Result<HpaWindow, WindowError> {
        let mut largest: Option<(&DaxDevice, HpaWindow)> = None;
        for window in &route.windows {
            for device in devices.iter().filter(|device| device.touches(window)) {
                let part = usable(device, window);
                if part.len >= wanted {
                    return Ok(part);
                }
                if largest.is_none_or(|(other, _)| other.range.len < device.range.len) {
                    largest = Some((device, *window));
                }
            }
        }
        if self.dev_mem {
            return Ok(route.windows[0]);
        }
        Err(match largest {
            Some((device, window)) => WindowError::DaxTooSmall {
                name: device.name.clone(),
                has: device.range,
                window,
                wanted,
            },
            None => WindowError::NoDax {
                window: route.windows[0],
                wanted,
            },
        })
    }

    /// Programs the host bridge, if it has decoders: one with a single root port needs none.
    fn program_bridge(
        &self,
        route: &Route,
        address: PciAddress,
        window: HpaWindow,
    ) -> Result<(), WindowError> {
        let [port] = self.sysfs.ports_above(address)?[..] else {
            return Err(WindowError::BehindSwitch { address });
        };
        let Some(bridge) = route.bridge else {
            return Ok(());
        };
        let mut registers = self.bridge_registers(&bridge)?;
        let routed = match Decoders::find(&mut registers) {
            Err(DecoderError::NoCapability) => return Ok(()),
            Err(error) => Err(error),
            Ok(mut decoders) => {
                let number = self.sysfs.port_number(port)?.unwrap_or_default();
                decoders.route(window, number)
            }
        };
        routed.map_err(|source| WindowError::Decoder {
            which: "the host bridge's decoder",
            source,
        })
    }

    fn bridge_registers(&self, bridge: &HostBridge) -> Result<MappedRegisters, WindowError> {
        let path = self.dev.join("mem");
        let mut registers = MappedRegisters::default();
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .and_then(|file| {
                let (block, at) = (RegisterBlock::Component, bridge.registers.0);
                registers.map(block, &file, at, bridge.len as usize, 0)
            })
            .map_err(|source| WindowError::NoBridgeRegisters {
                registers: bridge.registers,
                path,
                source,
            })?;
        Ok(registers)
    }

    /// Opens the file that shows the decoded addresses.
    fn open(
        &self,
        route: &Route,
        devices: &[DaxDevice],
        decoded: DecodedWindow,
        wanted: u64,
    ) -> Result<WindowFile, WindowError> {
        let device = match Self::covering(route, devices, &decoded, wanted) {
            Ok(device) => device,
            Err(_) if self.dev_mem => return self.open_memory(decoded),
            Err(error) => return Err(error),
        };
        if let Some(driver) = &device.driver
            && driver != DAX_DRIVER
        {
            return Err(WindowError::DaxInUse {
                name: device.name.clone(),
                driver: driver.clone(),
            });
        }
        let base = decoded.base.0 - device.range.base.0;
        if !base.is_multiple_of(device.align) {
            return Err(WindowError::DaxAlign {
                name: device.name.clone(),
                align: device.align,
                offset: base,
            });
        }
        dax::bind(&self.sysfs, device)?;
        let path = self.dev.join(&device.name);
        Ok(WindowFile {
            file: open_file(&path)?.into(),
            path,
            base,
            decoded,
            is_dev_mem: false,
        })
    }

    fn open_memory(&self, decoded: DecodedWindow) -> Result<WindowFile, WindowError> {
        let path = self.dev.join("mem");
        Ok(WindowFile {
            file: open_file(&path)?.into(),
            path,
            base: decoded.base.0,
            decoded,
            is_dev_mem: true,
        })
    }
}

/// A device's memory as the kernel's.
#[derive(Debug)]
pub struct NodeWindow {
    /// The machine's memory blocks.
    pub blocks: MemoryBlocks,
    /// The DAX device that `kmem` has.
    pub dax: String,
    /// The NUMA node that its blocks are put online in.
    pub node: u32,
    /// Which addresses they have.
    pub decoded: DecodedWindow,
}

/// How the host comes to a device.
struct Route {
    windows: Vec<HpaWindow>,
    bridge: Option<HostBridge>,
}

/// What decoders can use of the part of `window` that `device` covers.
fn usable(device: &DaxDevice, window: &HpaWindow) -> HpaWindow {
    let start = device
        .range
        .base
        .0
        .max(window.base.0)
        .next_multiple_of(GRANULARITY);
    let end = device.range.end().min(window.end());
    let len = end.0.saturating_sub(start) / GRANULARITY * GRANULARITY;
    HpaWindow {
        base: Hpa(start),
        len,
    }
}

fn open_file(path: &std::path::Path) -> Result<File, PciError> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|error| PciError::io(path, "opened", error))
}
