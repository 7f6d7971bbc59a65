//! Capacity as memory of a NUMA node, with files in place of the kernel's memory blocks.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dax_backend::address::{DpaRange, Hpa, HpaWindow};
use dax_backend::blocks::{Cleared, MemoryBlocks, NodeSurface, WholeBlocks};
use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest, ReleaseTarget};
use dax_backend::broker::receipt::{DpaSpan, HexDpa};
use dax_backend::broker::status::Status;
use dax_backend::broker::{
    Admit, Broker, BrokerClient, BrokerConfig, GRANULE, Receipt, Stop, Window,
};
use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::extent::ExtentTag;
use dax_backend::model::{ModelConfig, SoftwareDevice};
use dax_backend::orchestrator::Orchestrator;
use dax_backend::pci::Sysfs;

use crate::process::Forked;
use crate::rig::{serve, socket_of};
use dax_backend::broker::ConnectError;
use dax_backend::broker::protocol::RefusedCode;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 128 * MIB;
const BLOCKS: u64 = 4;
/// The window's first block.
const FIRST: u64 = 34;
const LIMIT: Duration = Duration::from_secs(60);

struct Rig {
    model: SoftwareDevice,
    root: tempfile::TempDir,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
}

impl Rig {
    fn new() -> Self {
        let rig = Self::without_surface();
        rig.put_online();
        rig
    }

    /// A broker whose capacity nobody has leased yet.
    fn without_surface() -> Self {
        let root = tempfile::tempdir().unwrap();
        let memory = root.path().join("devices/system/memory");
        for block in FIRST..FIRST + BLOCKS {
            fs::create_dir_all(memory.join(format!("memory{block}"))).unwrap();
            fs::write(memory.join(format!("memory{block}/state")), "offline\n").unwrap();
        }
        fs::write(memory.join("block_size_bytes"), "8000000\n").unwrap();
        let model = SoftwareDevice::new(ModelConfig::one_region(BLOCKS * BLOCK)).unwrap();
        let (stop, thread) = serve_node(&model, &root.path().join("broker.sock"));
        Self {
            model,
            root,
            stop,
            thread: Some(thread),
        }
    }

    /// Ends the broker, lets `meanwhile` happen, and starts another one without a surface.
    fn restart(&mut self, meanwhile: impl FnOnce(&Self)) {
        self.stop.now();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.settle_states();
        meanwhile(self);
        let (stop, thread) = serve_node(&self.model, &self.path());
        (self.stop, self.thread) = (stop, Some(thread));
    }

    /// Blocks that are online say so as the kernel does.
    fn settle_states(&self) {
        for block in self.online() {
            fs::write(self.state(block), "online\n").unwrap();
        }
    }

    /// Has a surface lease all there is.
    fn put_online(&self) {
        let window = HpaWindow {
            base: Hpa(FIRST * BLOCK),
            len: BLOCKS * BLOCK,
        };
        let blocks = MemoryBlocks::of(&Sysfs::new(self.root.path())).unwrap();
        let mut surface = NodeSurface::new(blocks, window);
        let (client, welcome) = BrokerClient::connect(&socket_of(&self.path()), 0).unwrap();
        thread::spawn(move || surface.serve(&client, &welcome));
    }

    fn state(&self, block: u64) -> PathBuf {
        let memory = self.root.path().join("devices/system/memory");
        memory.join(format!("memory{}/state", FIRST + block))
    }

    fn path(&self) -> PathBuf {
        self.root.path().join("broker.sock")
    }

    fn add(&self, sizes: &[u64]) {
        let mut fabric = self.model.fabric();
        Orchestrator::add(&mut fabric, sizes, ExtentTag::NULL).unwrap();
    }

    /// Blocks of the window that were told to be online.
    fn online(&self) -> Vec<u64> {
        let is_online = |block: &u64| {
            let state = fs::read_to_string(self.state(*block)).unwrap();
            let states = ["offline\n", "online_movable", "online\n", ""];
            assert!(states.contains(&state.as_str()), "{state}");
            state.starts_with("online")
        };
        (0..BLOCKS).filter(is_online).collect()
    }

    fn status(&self) -> Status {
        let admin = AdminClient::connect(&self.path()).unwrap();
        match admin.ask(&AdminRequest::Status, LIMIT).unwrap() {
            AdminReply::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// Waits until so many bytes are accepted and just these blocks online.
    fn until(&self, accepted: u64, online: &[u64]) {
        let start = Instant::now();
        loop {
            let now = (self.status().capacity.accepted, self.online());
            if now.0 == accepted && now.1 == online {
                return;
            }
            assert!(
                start.elapsed() < LIMIT,
                "{now:?}, not {accepted}, {online:?}"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn range(&self, start: u64, len: u64) -> DpaRange {
        let base = self.model.memory_span().start;
        DpaRange::new(dax_backend::address::Dpa(base.0 + start), len).unwrap()
    }

    fn release(&self, range: DpaRange) -> Receipt {
        let span = DpaSpan {
            dpa: HexDpa(range.start.0),
            len: range.len,
        };
        let request = AdminRequest::Release {
            target: ReleaseTarget::Range(span),
            deadline_ms: LIMIT.as_millis() as u64,
            force: false,
            past_deadline: false,
            progress: false,
        };
        let admin = AdminClient::connect(&self.path()).unwrap();
        match admin.ask(&request, 2 * LIMIT).unwrap() {
            AdminReply::Receipt(receipt) => receipt,
            other => panic!("{other:?}"),
        }
    }
}

/// A broker of whole blocks over `model`, at `path`.
fn serve_node(model: &SoftwareDevice, path: &Path) -> (Stop, JoinHandle<()>) {
    let config = DeviceConfig {
        prepare: Box::new(WholeBlocks { size: BLOCK }),
        ..DeviceConfig::default()
    };
    let device = DcDevice::open(model.mmio(), config).unwrap();
    let config = BrokerConfig {
        admit: Admit::Itself,
        warm_reserve: 0,
        recall_deadline: LIMIT,
        ..BrokerConfig::default()
    };
    let window = Window::hollow(device.dc_span().len).unwrap();
    let broker = Broker::new(Box::new(Cleared(device)), None, window, config).unwrap();
    serve(path, broker)
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.stop.now();
    }
}

#[test]
fn whole_blocks_of_what_comes_are_online_and_what_is_asked_back_is_offline_first() {
    let rig = Rig::new();
    rig.add(&[2 * BLOCK, BLOCK / 2]);
    rig.until(2 * BLOCK, &[0, 1]);

    // The operator takes a little: its block goes offline, and the rest of that stays there unused.
    let receipt = rig.release(rig.range(BLOCK, GRANULE));
    assert_eq!(receipt.returned, GRANULE, "{receipt:?}");
    assert_eq!(receipt.returned_to_dram, GRANULE, "{receipt:?}");
    rig.until(2 * BLOCK - GRANULE, &[0]);

    // The device asks for a block.
    let asked = rig.range(0, BLOCK);
    Orchestrator::release(&mut rig.model.fabric(), &[asked], false).unwrap();
    rig.until(BLOCK - GRANULE, &[]);
    let audit = rig.model.audit();
    assert!(audit.is_clean(), "{audit:?}");

    // What is accepted anew is online again. The free granule and its neighbours are no block.
    rig.add(&[BLOCK]);
    rig.until(2 * BLOCK - GRANULE, &[0]);
}

#[test]
fn a_block_that_cannot_be_emptied_keeps_its_extent() {
    let rig = Rig::new();
    rig.add(&[BLOCK]);
    rig.until(BLOCK, &[0]);
    let state = rig.state(0);
    fs::remove_file(&state).unwrap();
    fs::create_dir(&state).unwrap();
    let receipt = rig.release(rig.range(0, BLOCK));
    assert_eq!(receipt.returned, 0, "{receipt:?}");
    assert_eq!(
        receipt.refused[0].reason.to_string(),
        "the client could not move it"
    );
    assert_eq!(rig.status().capacity.accepted, BLOCK);
}

/// An earlier broker has left blocks online, and the device has asked for one of them since: it
/// is in use, although nobody has leased it yet.
#[test]
fn what_an_earlier_broker_left_online_is_offline_before_the_device_gets_it() {
    let mut rig = Rig::new();
    rig.add(&[2 * BLOCK]);
    rig.until(2 * BLOCK, &[0, 1]);
    rig.restart(|rig| {
        let asked = rig.range(0, BLOCK);
        Orchestrator::release(&mut rig.model.fabric(), &[asked], false).unwrap();
    });
    thread::sleep(Duration::from_millis(300));
    assert_eq!(rig.status().capacity.accepted, 2 * BLOCK);
    rig.put_online();
    rig.until(BLOCK, &[1]);
}

/// Nobody can be asked, but the kernel must not go on using it.
#[test]
fn what_is_taken_by_force_is_taken_offline() {
    let rig = Rig::new();
    rig.add(&[2 * BLOCK]);
    rig.until(2 * BLOCK, &[0, 1]);
    rig.settle_states();
    let taken = rig.range(BLOCK, BLOCK);
    Orchestrator::release(&mut rig.model.fabric(), &[taken], true).unwrap();
    rig.until(BLOCK, &[0]);
    // Then it is let go of, and may come again.
    rig.add(&[BLOCK]);
    rig.until(2 * BLOCK, &[0, 1]);
    let capacity = rig.status().capacity;
    assert_eq!((capacity.leased, capacity.lost), (2 * BLOCK, 0));
}

#[test]
fn programs_get_no_lease_of_what_is_memory_of_a_node() {
    let rig = Rig::new();
    let socket = socket_of(&rig.path());
    let mut program = Forked::run(|| match BrokerClient::connect(&socket, 0) {
        Err(ConnectError::Refused {
            code: RefusedCode::Node,
            ..
        }) => b'n',
        Ok(_) => b'+',
        Err(_) => b'?',
    });
    assert_eq!(program.answer(), b'n');
}
