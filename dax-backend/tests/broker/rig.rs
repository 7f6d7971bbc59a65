//! A broker on a thread, over a software device, and clients for it.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::ptr;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use dax_backend::broker::admin::{
    AdminClient, AdminError, AdminReply, AdminRequest, ReleaseTarget,
};
use dax_backend::broker::receipt::{DpaSpan, HexDpa};
use dax_backend::broker::status::Status;
use dax_backend::broker::{
    Admit, Broker, BrokerClient, BrokerConfig, CapacityPolicy, ForkFamily, FromBroker, GRANULE,
    Listener, Notice, Ranges, Receipt, ServeFamily, Stop, Store, StoreSocket, Welcome, Window,
    WindowRange,
};
use dax_backend::capacity::CapacityDevice;
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::extent::{Extent, ExtentTag};
use dax_backend::model::{ModelConfig, ModelRegion, SoftwareDevice};
use dax_backend::orchestrator::Orchestrator;
use rustix::mm::{MapFlags, ProtFlags, mmap};

pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// What a test wants of its broker.
pub(crate) struct Setup {
    /// Granules of each extent that is offered at the start.
    pub(crate) offer: &'static [u64],
    pub(crate) admit: Admit,
    pub(crate) orchestrator: bool,
    pub(crate) recall_deadline: Duration,
    pub(crate) policy: Option<CapacityPolicy>,
    /// Serves forks instead of a thread.
    pub(crate) serve_family: ServeFamily,
    /// Tells of pressure instead of the kernel.
    pub(crate) pressure: Option<OwnedFd>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            offer: &[32],
            admit: Admit::Owner,
            orchestrator: true,
            recall_deadline: Duration::from_secs(2),
            policy: None,
            serve_family: ForkFamily::serve_on_thread,
            pressure: None,
        }
    }
}

pub(crate) struct Rig {
    pub(crate) model: SoftwareDevice,
    pub(crate) path: PathBuf,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    keeper: Keeper,
    _directory: tempfile::TempDir,
}

/// Holds what the broker wants to outlive it.
struct Keeper {
    socket: StoreSocket,
    kept: BTreeMap<String, OwnedFd>,
}

impl Keeper {
    /// For a broker that gets `kept` from an earlier one.
    fn new(kept: BTreeMap<String, OwnedFd>) -> (Self, Store) {
        let (socket, broker) = StoreSocket::pair().unwrap();
        for (name, fd) in &kept {
            socket.keep(name, fd.as_fd()).unwrap();
        }
        socket.ready().unwrap();
        (Self { socket, kept }, Store::receive(broker).unwrap())
    }

    /// What is kept when the broker is gone.
    fn kept(&mut self) -> BTreeMap<String, OwnedFd> {
        while let Some(notice) = self.socket.receive().unwrap() {
            match notice {
                Notice::Keep(name, fd) => drop(self.kept.insert(name, fd)),
                Notice::Forget(name) => drop(self.kept.remove(&name)),
                _ => {}
            }
        }
        std::mem::take(&mut self.kept)
    }
}

/// A path as clients take it.
pub(crate) fn socket_of(path: &std::path::Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// Has `broker` listen at `path` on a thread of its own.
pub(crate) fn serve(path: &std::path::Path, mut broker: Broker) -> (Stop, JoinHandle<()>) {
    let listener = Listener::bind(path, true).unwrap();
    let stop = Stop::new().unwrap();
    let thread = {
        let stop = stop.clone();
        thread::spawn(move || broker.serve(&listener, &stop).unwrap())
    };
    (stop, thread)
}

impl Rig {
    pub(crate) fn new(offer: &'static [u64]) -> Self {
        Self::with(Setup {
            offer,
            ..Setup::default()
        })
    }

    pub(crate) fn with(setup: Setup) -> Self {
        let model = SoftwareDevice::new(ModelConfig::one_region(512 << 20)).unwrap();
        Self::over(model, setup)
    }

    /// Over a device whose second DC region, of 64 MiB, can be shared between hosts.
    pub(crate) fn with_shared(offer: &'static [u64]) -> Self {
        let shared = ModelRegion {
            sharable: true,
            ..ModelRegion::of(64 << 20)
        };
        let config = ModelConfig {
            dc_regions: vec![ModelRegion::of(256 << 20), shared],
            ..ModelConfig::default()
        };
        let setup = Setup {
            offer,
            ..Setup::default()
        };
        Self::over(SoftwareDevice::new(config).unwrap(), setup)
    }

    pub(crate) fn over(model: SoftwareDevice, setup: Setup) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = directory.path().join("broker.sock");
        let (keeper, store) = Keeper::new(BTreeMap::new());
        let (stop, thread) = serve(&path, broker_over(&model, &setup, store));
        Self {
            model,
            path,
            stop,
            thread: Some(thread),
            keeper,
            _directory: directory,
        }
    }

    /// Ends the broker, lets `meanwhile` happen and starts another one over
    /// what the first one left.
    pub(crate) fn restart(&mut self, meanwhile: impl FnOnce(&SoftwareDevice)) {
        self.stop();
        meanwhile(&self.model);
        let kept = self.keeper.kept();
        self.start_over(kept);
    }

    /// Ends the broker and starts another one, which has had so many clients
    /// that the next one's number is `next`.
    pub(crate) fn restart_numbering(&mut self, next: u64) {
        self.stop();
        let kept = self.keeper.kept();
        // The fourth word of a ledger.
        rustix::io::pwrite(&kept["ledger"], &next.to_ne_bytes(), 24).unwrap();
        self.start_over(kept);
    }

    fn start_over(&mut self, kept: BTreeMap<String, OwnedFd>) {
        let (keeper, store) = Keeper::new(kept);
        let setup = Setup {
            offer: &[],
            ..Setup::default()
        };
        let (stop, thread) = serve(&self.path, broker_over(&self.model, &setup, store));
        self.keeper = keeper;
        self.stop = stop;
        self.thread = Some(thread);
    }

    pub(crate) fn socket(&self) -> CString {
        socket_of(&self.path)
    }

    pub(crate) fn client(&self) -> Client {
        let (broker, welcome) = BrokerClient::connect(&self.socket(), 0).unwrap();
        Client { broker, welcome }
    }

    pub(crate) fn admin(&self) -> AdminClient {
        AdminClient::connect(&self.path).unwrap()
    }

    pub(crate) fn ask(&self, request: &AdminRequest) -> Result<AdminReply, AdminError> {
        self.admin().ask(request, Duration::from_secs(10))
    }

    pub(crate) fn status(&self) -> Status {
        match self.ask(&AdminRequest::Status).unwrap() {
            AdminReply::Status(status) => *status,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn release(&self, target: ReleaseTarget, deadline_ms: u64) -> Receipt {
        let request = AdminRequest::Release {
            target,
            deadline_ms,
            force: false,
            past_deadline: false,
            progress: false,
        };
        match self.ask(&request).unwrap() {
            AdminReply::Receipt(receipt) => {
                // The books balance, whatever happened.
                assert_eq!(
                    receipt.returned,
                    receipt.steps().iter().map(|(_, bytes)| bytes).sum::<u64>()
                );
                receipt
            }
            other => panic!("{other:?}"),
        }
    }

    /// Granules `first..first + count` of the window as the device addresses them.
    pub(crate) fn range(&self, first: u64, count: u64) -> DpaSpan {
        DpaSpan {
            dpa: HexDpa(self.model.memory_span().start.0 + first * GRANULE),
            len: count * GRANULE,
        }
    }

    /// Waits until the broker's status is as `wanted`, at most `limit`.
    pub(crate) fn until(&self, limit: Duration, wanted: impl Fn(&Status) -> bool) -> Status {
        let started = Instant::now();
        loop {
            let status = self.status();
            if wanted(&status) {
                return status;
            }
            assert!(
                started.elapsed() < limit,
                "not within {limit:?}: {status:#?}"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn stop(&mut self) {
        self.stop.now();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// What the device itself lists as accepted (4801h), read by a driver of its own.
    pub(crate) fn listed(&mut self) -> Vec<Extent> {
        self.stop();
        let device = DcDevice::open(self.model.mmio(), DeviceConfig::default()).unwrap();
        device.accepted().to_vec()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.stop();
        }
    }
}

fn broker_over(model: &SoftwareDevice, setup: &Setup, store: Store) -> Broker {
    let config = DeviceConfig {
        // As `with_shared` makes it.
        sharable_regions: 0b10,
        ..DeviceConfig::default()
    };
    let mut device = DcDevice::open(model.mmio(), config).unwrap();
    let mut fabric = model.fabric();
    if !setup.offer.is_empty() {
        let sizes: Vec<u64> = setup.offer.iter().map(|count| count * GRANULE).collect();
        Orchestrator::add(&mut fabric, &sizes, ExtentTag::NULL).unwrap();
        while device.accepted().len() < sizes.len() {
            device.poll().unwrap();
        }
    }
    let fd = model.memory().try_clone_to_owned().unwrap();
    let window = Window::map(fd, 0, device.dc_span().len).unwrap();
    let config = BrokerConfig {
        admit: setup.admit,
        recall_deadline: setup.recall_deadline,
        warm_reserve: 4 * GRANULE,
        policy: setup.policy,
        serve_family: setup.serve_family,
        ..BrokerConfig::default()
    };
    let orchestrator: Option<Box<dyn Orchestrator>> = match setup.orchestrator {
        true => Some(Box::new(fabric)),
        false => None,
    };
    let mut broker =
        Broker::with_store(Box::new(device), orchestrator, window, config, store).unwrap();
    if let Some(trigger) = &setup.pressure {
        broker.watch_pressure(trigger.try_clone().unwrap());
    }
    broker
}

/// A client that does what the test tells it.
pub(crate) struct Client {
    pub(crate) broker: BrokerClient,
    pub(crate) welcome: Welcome,
}

impl Client {
    /// Leases `granules`; what was granted, and whether the broker has no more.
    pub(crate) fn lease(&self, granules: u64) -> (Vec<WindowRange>, bool) {
        self.lease_of(ExtentTag::NULL, granules)
    }

    /// The same, of the capacity with this tag.
    pub(crate) fn lease_of(&self, wanted: ExtentTag, granules: u64) -> (Vec<WindowRange>, bool) {
        let asked = self.broker.request_tagged_lease(granules * GRANULE, wanted);
        asked.unwrap();
        let mut granted = Vec::new();
        loop {
            match self.next() {
                FromBroker::Grant {
                    ranges,
                    tag,
                    exhausted,
                    last,
                } => {
                    assert_eq!(tag, wanted);
                    granted.extend_from_slice(ranges.as_slice());
                    if last {
                        return (granted, exhausted);
                    }
                }
                FromBroker::CapacityAvailable => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn next(&self) -> FromBroker {
        self.broker
            .recv(Some(PATIENCE))
            .unwrap()
            .expect("the broker says nothing")
    }

    /// The next recall: its id, bytes and ranges.
    pub(crate) fn next_recall(&self) -> (u64, u64, Ranges, bool) {
        loop {
            match self.next() {
                FromBroker::Recall {
                    id,
                    bytes,
                    ranges,
                    lost,
                    ..
                } => return (id, bytes, ranges, lost),
                FromBroker::CapacityAvailable => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub(crate) fn give_back(&self, ranges: &[WindowRange]) {
        self.broker.return_ranges(ranges).unwrap();
    }

    /// The whole window, mapped; never unmapped.
    pub(crate) fn memory(&self) -> *mut u8 {
        map_window(&self.welcome).unwrap()
    }
}

/// Maps the window without allocating, for use after fork.
pub(crate) fn map_window(welcome: &Welcome) -> rustix::io::Result<*mut u8> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let address = unsafe {
        mmap(
            ptr::null_mut(),
            welcome.window_len as usize,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &welcome.window,
            welcome.window_base,
        )
    }?;
    Ok(address.cast())
}

/// Fills `ranges` with a pattern that is nowhere zero.
pub(crate) fn scribble(memory: *mut u8, ranges: &[WindowRange]) {
    for range in ranges {
        // SAFETY: leased to the caller, inside the mapped window.
        unsafe { ptr::write_bytes(memory.add(range.offset as usize), 0xa5, range.len as usize) };
    }
}

/// Whether every byte of `ranges` is zero.
pub(crate) fn is_zero(memory: *mut u8, ranges: &[WindowRange]) -> bool {
    ranges.iter().all(|range| {
        // SAFETY: leased to the caller, inside the mapped window; nobody else writes there.
        let bytes = unsafe {
            std::slice::from_raw_parts(memory.add(range.offset as usize), range.len as usize)
        };
        bytes.iter().all(|byte| *byte == 0)
    })
}

pub(crate) fn total(ranges: &[WindowRange]) -> u64 {
    ranges.iter().map(|range| range.len).sum()
}
