//! QEMU's type 3 device under the tests, without a guest: the processors of its machine never run, and
//! registers are reached through the qtest socket.
//!
//! What a firmware would do at boot is done here: bus numbers, base addresses, the configuration window.

mod monitor;
mod qtest;
pub(crate) mod uio;

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dax_backend::address::DpaRange;
use dax_backend::extent::ExtentTag;
use dax_backend::mmio::{Mmio, RegisterBlock};
use dax_backend::orchestrator::qmp::QmpTarget;
use dax_backend::pci::config::{ConfigSpace, enable, register_blocks};
use parking_lot::Mutex;

use monitor::Monitor;
use qtest::{Function, Qtest};

/// What QEMU answers to must not depend on how busy the machine is.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where configuration space is made to appear (PCIe r6.0 7.2.2).
const ECAM: u64 = 0xb000_0000;
/// The CXL host bridge's first bus, and the one behind its root port.
const BUS: u64 = 52;
/// Base addresses that are given to the device, 64 KiB each.
const BARS: [(u16, u32); 3] = [
    (0x10, 0xe000_0000),
    (0x18, 0xe001_0000),
    (0x20, 0xe002_0000),
];
/// A root port, and a file of 1 GiB.
const MACHINE: &str = "-machine q35,cxl=on -accel tcg -S -display none -nodefaults -m 128M \
    -M cxl-fmw.0.targets.0=cxl.0,cxl-fmw.0.size=4G \
    -object memory-backend-ram,id=dc0,size=1G \
    -device pxb-cxl,bus_nr=52,bus=pcie.0,id=cxl.0 \
    -device cxl-rp,port=0,bus=cxl.0,id=rp0,chassis=0,slot=2";
/// 1 GiB of dynamic capacity in one region, which begins at DPA 0, behind the root port.
const DEVICE: &str =
    "-device cxl-type3,bus=rp0,volatile-dc-memdev=dc0,num-dc-regions=1,id=dcd0,sn=99";
/// The same behind port 0 of a switch, which has a mailbox for fabric managers beside its upstream port.
const SWITCH: &str = "-device cxl-upstream,bus=rp0,id=us0,addr=0.0,multifunction=on \
    -device cxl-switch-mailbox-cci,bus=rp0,addr=0.1,target=us0 \
    -device cxl-downstream,port=0,bus=us0,id=ds0,chassis=0,slot=4 \
    -device cxl-type3,bus=ds0,volatile-dc-memdev=dc0,num-dc-regions=1,id=dcd0,sn=99";

/// A machine with one of QEMU's devices.
pub(crate) trait Machine {
    fn mmio(&self) -> Box<dyn Mmio>;
    /// The same device for an orchestrator, at a monitor of its own, if this machine has one.
    fn target(&self) -> Option<QmpTarget>;
    /// Offers ranges of region 0 as one More group.
    fn add(&self, ranges: &[DpaRange], tag: ExtentTag);
    /// Asks for ranges of region 0 back.
    fn release(&self, ranges: &[DpaRange]);
}

/// A machine with one device and no guest. It ends with this, or with the thread that started it.
pub(crate) struct Qemu {
    process: Child,
    qtest: Arc<Mutex<Qtest>>,
    monitor: Mutex<Monitor>,
    /// Where the component and the device registers are.
    blocks: [u64; 2],
    directory: tempfile::TempDir,
}

impl Qemu {
    pub(crate) fn start() -> Self {
        Self::launch(DEVICE, boot)
    }

    /// A machine with a switch: its registers are those of the switch's mailbox for fabric managers.
    pub(crate) fn with_a_switch() -> Self {
        Self::launch(SWITCH, boot_mailbox)
    }

    fn launch(devices: &str, boot: fn(&mut Qtest) -> [u64; 2]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let (registers, monitor) = (directory.path().join("qtest"), directory.path().join("qmp"));
        let listener = UnixListener::bind(&registers).expect("a socket");
        // Its own death signal, so that a test that is killed leaves no machine behind.
        let mut process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(MACHINE.split_whitespace())
            .args(devices.split_whitespace())
            .arg("-qtest")
            .arg(format!("unix:{}", registers.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", monitor.display()))
            .arg("-qmp")
            .arg(format!(
                "unix:{},server=on,wait=off",
                directory.path().join("orchestrator").display()
            ))
            .args(["-qtest-log", "/dev/null"])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-system-x86_64 and setpriv are installed");
        let stream = accept(&listener, &mut process);
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        let mut qtest = Qtest::new(stream);
        let blocks = boot(&mut qtest);
        let stream = connect(&monitor);
        stream.set_read_timeout(Some(PATIENCE)).expect("a time-out");
        Self {
            process,
            qtest: Arc::new(Mutex::new(qtest)),
            monitor: Mutex::new(Monitor::new(stream)),
            blocks,
            directory,
        }
    }
}

impl Machine for Qemu {
    fn mmio(&self) -> Box<dyn Mmio> {
        Box::new(Registers {
            qtest: Arc::clone(&self.qtest),
            blocks: self.blocks,
        })
    }

    fn target(&self) -> Option<QmpTarget> {
        Some(QmpTarget {
            socket: self.directory.path().join("orchestrator"),
            device: "/machine/peripheral/dcd0".into(),
        })
    }

    fn add(&self, ranges: &[DpaRange], tag: ExtentTag) {
        self.monitor.lock().add(ranges, tag);
    }

    fn release(&self, ranges: &[DpaRange]) {
        self.monitor.lock().release(ranges);
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn accept(listener: &UnixListener, process: &mut Child) -> UnixStream {
    listener.set_nonblocking(true).expect("a socket");
    let start = Instant::now();
    loop {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false).expect("a socket");
            return stream;
        }
        let ended = process.try_wait().expect("a child");
        assert!(ended.is_none(), "QEMU ended: {ended:?}");
        assert!(start.elapsed() < PATIENCE, "QEMU does not connect");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn connect(path: &Path) -> UnixStream {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(start.elapsed() < PATIENCE, "no monitor: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Brings the device up, and finds its registers by the Register Locator.
fn boot(qtest: &mut Qtest) -> [u64; 2] {
    open_port(qtest);
    let mut device = Function {
        qtest,
        at: ECAM + ((BUS + 1) << 20),
    };
    for (offset, base) in BARS {
        device.write32(offset, base).expect("QEMU writes");
        device.write32(offset + 4, 0).expect("QEMU writes");
    }
    enable(&mut device).expect("QEMU writes");
    let located = register_blocks(&mut device).expect("QEMU reads");
    [RegisterBlock::Component, RegisterBlock::Device].map(|block| {
        let found = located.iter().find(|location| location.block == block);
        let found = found.expect("the device has a Register Locator");
        u64::from(BARS[usize::from(found.bar / 2)].1) + found.offset
    })
}

/// The same for the mailbox of a switch, which has device registers only.
fn boot_mailbox(qtest: &mut Qtest) -> [u64; 2] {
    open_port(qtest);
    let mut mailbox = Function {
        qtest,
        at: ECAM + ((BUS + 1) << 20) + (1 << 12),
    };
    let (offset, base) = BARS[0];
    mailbox.write32(offset, base).expect("QEMU writes");
    mailbox.write32(offset + 4, 0).expect("QEMU writes");
    enable(&mut mailbox).expect("QEMU writes");
    let located = register_blocks(&mut mailbox).expect("QEMU reads");
    let found = located
        .iter()
        .find(|location| location.block == RegisterBlock::Device && location.bar == 0);
    let found = found.expect("the switch has a Register Locator");
    [0, u64::from(base) + found.offset]
}

/// Has the root port pass on what is for the bus and the addresses behind it.
fn open_port(qtest: &mut Qtest) {
    qtest.write_port(0x64, 0);
    qtest.write_port(0x60, ECAM as u32 | 1);
    let mut port = Function {
        qtest,
        at: ECAM + (BUS << 20),
    };
    let mut write = |offset, value| port.write32(offset, value).expect("QEMU writes");
    let (primary, secondary) = (BUS as u32, BUS as u32 + 1);
    write(0x18, secondary << 16 | secondary << 8 | primary);
    // The memory behind the port: 1 MiB at the first base address.
    write(0x20, BARS[0].1 | BARS[0].1 >> 16);
    write(0x04, 0b110);
}

/// The register blocks of a machine's device.
struct Registers {
    qtest: Arc<Mutex<Qtest>>,
    blocks: [u64; 2],
}

impl Registers {
    fn at(&self, block: RegisterBlock, offset: u32) -> u64 {
        let base = match block {
            RegisterBlock::Component => self.blocks[0],
            RegisterBlock::Device => self.blocks[1],
        };
        base + u64::from(offset)
    }
}

impl Mmio for Registers {
    fn block_len(&self, block: RegisterBlock) -> u32 {
        match block {
            RegisterBlock::Component => 0x1_0000,
            RegisterBlock::Device => 0x1000,
        }
    }

    fn read32(&mut self, block: RegisterBlock, offset: u32) -> u32 {
        self.qtest.lock().read32(self.at(block, offset))
    }

    fn read64(&mut self, block: RegisterBlock, offset: u32) -> u64 {
        self.qtest.lock().read64(self.at(block, offset))
    }

    fn write32(&mut self, block: RegisterBlock, offset: u32, value: u32) {
        self.qtest.lock().write32(self.at(block, offset), value);
    }

    fn write64(&mut self, block: RegisterBlock, offset: u32, value: u64) {
        self.qtest.lock().write64(self.at(block, offset), value);
    }

    fn read_payload(&mut self, offset: u32, payload: &mut [u8]) {
        let at = self.at(RegisterBlock::Device, offset);
        self.qtest.lock().read(at, payload);
    }

    fn write_payload(&mut self, offset: u32, payload: &[u8]) {
        let at = self.at(RegisterBlock::Device, offset);
        self.qtest.lock().write(at, payload);
    }
}
