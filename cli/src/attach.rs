//! A CXL device of this machine with a broker over it.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use dax_backend::broker::{Admit, Broker, BrokerConfig, Window};
use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::journal::FileJournal;
use dax_backend::orchestrator::Orchestrator;
use dax_backend::orchestrator::qmp::{QmpOrchestrator, QmpTarget};
use dax_backend::pci::{PciAddress, Sysfs};
use dax_backend::window::Platform;

use crate::failure::Failure;
use crate::size::Bytes;
use crate::{marks, sockets};

/// How a device is reached.
#[derive(Debug, Clone, Args)]
pub(crate) struct Attach {
    /// Where no /dev/daxX.Y covers the device's memory, use /dev/mem: for root's programs only, without O_DIRECT
    #[arg(long, requires = "device", conflicts_with = "emulate")]
    dev_mem: bool,
    /// Who adds capacity to the device when the broker or `dcm add` wants more: QEMU's monitor
    #[arg(long, value_name = "qmp:SOCKET,DEVICE", requires = "device", conflicts_with = "emulate", value_parser = marks::parse_orchestrator)]
    orchestrator: Option<QmpTarget>,
    /// DC regions of the device that are shared with other hosts, by number: what its CDAT calls sharable, which is not read
    #[arg(long, value_name = "N,…", requires = "device", conflicts_with = "emulate", value_delimiter = ',', value_parser = clap::value_parser!(u8).range(0..8))]
    shared_regions: Vec<u8>,
    /// Another tree than /sys
    #[arg(long, hide = true, value_name = "PATH", default_value = "/sys")]
    sysfs: PathBuf,
}

impl Attach {
    /// The same options, for another `dcm`.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut arguments = vec!["--sysfs".into(), self.sysfs.clone().into()];
        if self.dev_mem {
            arguments.push("--dev-mem".into());
        }
        for region in &self.shared_regions {
            arguments.extend(["--shared-regions".into(), region.to_string().into()]);
        }
        if let Some(QmpTarget { socket, device }) = &self.orchestrator {
            let mut target = OsString::from("qmp:");
            target.push(socket);
            target.push(",");
            target.push(device);
            arguments.extend(["--orchestrator".into(), target]);
        }
        arguments
    }
}

/// Takes over the device at `address`, with the capacity that it says is accepted, and puts a
/// broker over it.
pub(crate) fn broker(
    address: PciAddress,
    attach: &Attach,
    mut config: BrokerConfig,
) -> Result<(Broker, String), Failure> {
    let platform = Platform {
        sysfs: Sysfs::new(&attach.sysfs),
        dev_mem: attach.dev_mem,
        ..Platform::default()
    };
    let registers = platform.sysfs.open(address)?;
    let device_config = DeviceConfig {
        journal: Box::new(FileJournal::new(journal(address)?)),
        sharable_regions: attach.shared_regions.iter().fold(0, |all, n| all | 1 << n),
        ..DeviceConfig::default()
    };
    let mut device = DcDevice::open(registers, device_config)
        .with_context(|| format!("{address} does not open"))?;
    let window = platform.reach(&mut device, address)?;
    if window.is_dev_mem {
        // Whoever has the descriptor has the machine.
        config.admit = Admit::Owner;
        eprintln!(
            "dcm: serving through {}, for root's programs only: each of them can map all of this \
             machine's memory, and O_DIRECT and io_uring buffers on extents fail",
            window.path.display()
        );
    }
    // Pages of a device are as large as they get.
    config.warm_reserve = 0;
    let held: u64 = device
        .accepted()
        .iter()
        .map(|extent| extent.range.len)
        .sum();
    let span = device.dc_span().len;
    let regions = device.regions().to_vec();
    let told = format!(
        "{} of {} of {address} through {}",
        Bytes(held),
        Bytes(span),
        window.path.display()
    );
    let window = Window::of_device(window.file, window.base, span)
        .with_context(|| format!("{} cannot be mapped", window.path.display()))?;
    let orchestrator = attach
        .orchestrator
        .clone()
        .map(|target| Box::new(QmpOrchestrator::new(target, &regions)) as Box<dyn Orchestrator>);
    let broker = Broker::new(Box::new(device), orchestrator, window, config)?;
    Ok((broker, told))
}

/// Where groups are written down that are read and not answered yet.
fn journal(address: PciAddress) -> anyhow::Result<PathBuf> {
    let directory: &Path = &sockets::directory()?.join("devices");
    fs::create_dir_all(directory)
        .with_context(|| format!("{} cannot be made", directory.display()))?;
    Ok(directory.join(format!("{address}.journal")))
}
