//! A CXL device of this machine with a broker over it.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use dax_backend::address::HpaWindow;
use dax_backend::blocks::{Cleared, MemoryBlocks, NodeSurface, WholeBlocks};
use dax_backend::broker::{Admit, Broker, BrokerConfig, Window};
use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::journal::FileJournal;
use dax_backend::orchestrator::Orchestrator;
use dax_backend::orchestrator::fm::FmOrchestrator;
use dax_backend::orchestrator::qmp::QmpOrchestrator;
use dax_backend::pci::{PciAddress, Sysfs};
use dax_backend::region::DcRegion;
use dax_backend::window::Platform;

use crate::failure::Failure;
use crate::manager::Manager;
use crate::size::Bytes;
use crate::sockets;

/// How long taking memory blocks offline may take when the device asks for them: the kernel moves
/// all pages that are on them.
const OFFLINE: Duration = Duration::from_secs(600);

/// What becomes of a device's capacity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Surface {
    /// Leases for programs under dcm run and for those that link the library
    #[default]
    Programs,
    /// Memory of a NUMA node, for any program: blocks are put online as capacity comes, and taken offline for a release
    Node,
}

/// How a device is reached.
#[derive(Debug, Clone, Args)]
pub(crate) struct Attach {
    /// Where no /dev/daxX.Y covers the device's memory, use /dev/mem: for root's programs only, without O_DIRECT
    #[arg(long, requires = "device", conflicts_with = "emulate")]
    dev_mem: bool,
    /// Who adds capacity to the device when the broker or `dcm add` wants more: QEMU's monitor, or a
    /// fabric manager's mailbox: a switch's, with the device's port behind it, or one of the device
    #[arg(long, value_name = "qmp:SOCKET,DEVICE | fm:BDF[,PORT]", requires = "device", conflicts_with = "emulate", value_parser = Manager::parse)]
    orchestrator: Option<Manager>,
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
        if let Some(manager) = &self.orchestrator {
            arguments.extend(["--orchestrator".into(), manager.to_argument()]);
        }
        arguments
    }

    /// Who adds capacity in `regions`, if somebody was named.
    fn orchestrator(&self, regions: &[DcRegion]) -> Result<Option<Box<dyn Orchestrator>>, Failure> {
        Ok(match &self.orchestrator {
            None => None,
            Some(Manager::Qmp(target)) => {
                Some(Box::new(QmpOrchestrator::new(target.clone(), regions)))
            }
            Some(Manager::Mailbox { address, port }) => {
                let sysfs = Sysfs::new(&self.sysfs);
                let registers = sysfs.open_mailbox(*address)?;
                let manager = FmOrchestrator::open(registers, *port, regions)
                    .with_context(|| format!("the mailbox of {address} does not open"))?;
                Some(Box::new(manager))
            }
        })
    }
}

/// A broker over a device.
pub(crate) struct Served {
    pub(crate) broker: Broker,
    /// What is served, in words.
    pub(crate) told: String,
    /// What makes memory of a node of it, once the broker serves.
    pub(crate) surface: Option<NodeSurface>,
}

/// Takes over the device at `address`, with the capacity that it says is accepted, and puts a
/// broker over it.
pub(crate) fn broker(
    address: PciAddress,
    attach: &Attach,
    surface: Surface,
    mut config: BrokerConfig,
) -> Result<Served, Failure> {
    let platform = Platform {
        sysfs: Sysfs::new(&attach.sysfs),
        dev_mem: attach.dev_mem,
        ..Platform::default()
    };
    let registers = platform.sysfs.open(address)?;
    let mut device_config = DeviceConfig {
        journal: Box::new(FileJournal::new(journal(address)?)),
        sharable_regions: attach.shared_regions.iter().fold(0, |all, n| all | 1 << n),
        ..DeviceConfig::default()
    };
    if surface == Surface::Node {
        // Before the device is answered: what could not be put online is not taken.
        let blocks = MemoryBlocks::of(&platform.sysfs)?;
        blocks.check_policy()?;
        let size = blocks.size();
        device_config.prepare = Box::new(WholeBlocks { size });
    }
    let mut device = DcDevice::open(registers, device_config)
        .with_context(|| format!("{address} does not open"))?;
    let orchestrator = attach.orchestrator(device.regions())?;
    // Pages of a device are as large as they get.
    config.warm_reserve = 0;
    let held: u64 = device
        .accepted()
        .iter()
        .map(|extent| extent.range.len)
        .sum();
    let span = device.dc_span();
    let what = format!("{} of {} of {address}", Bytes(held), Bytes(span.len));
    if surface == Surface::Node {
        let node = platform.reach_as_node(&mut device, address)?;
        // A lease is the kernel's to use; programs have other ways to it.
        config.admit = Admit::Itself;
        config.recall_deadline = OFFLINE;
        let base = node.decoded.hpa(span.start);
        let base = base.context("the decoder does not reach the first DC region")?;
        let told = format!(
            "{what} as memory of NUMA node {}, in blocks of {}",
            node.node,
            Bytes(node.blocks.size())
        );
        let window = HpaWindow {
            base,
            len: span.len,
        };
        let surface = NodeSurface::new(node.blocks, window);
        let window = Window::hollow(span.len).context("no memory for a window")?;
        let broker = Broker::new(Box::new(Cleared(device)), orchestrator, window, config)?;
        return Ok(Served {
            broker,
            told,
            surface: Some(surface),
        });
    }
    // Whoever started us may have forbidden huge pages (PR_SET_THP_DISABLE), and the device has no others. A
    // kernel that knows none has nothing to allow.
    let _ = rustix::thread::disable_transparent_huge_pages(false);
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
    let told = format!("{what} through {}", window.path.display());
    let window = Window::of_device(window.file, window.base, span.len)
        .with_context(|| format!("{} cannot be mapped", window.path.display()))?;
    let broker = Broker::new(Box::new(device), orchestrator, window, config)?;
    Ok(Served {
        broker,
        told,
        surface: None,
    })
}

/// Where groups are written down that are read and not answered yet.
fn journal(address: PciAddress) -> anyhow::Result<PathBuf> {
    let directory: &Path = &sockets::directory()?.join("devices");
    fs::create_dir_all(directory)
        .with_context(|| format!("{} cannot be made", directory.display()))?;
    Ok(directory.join(format!("{address}.journal")))
}
