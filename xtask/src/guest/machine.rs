//! A q35 machine with a CXL host bridge, a root port and a Dynamic Capacity Device, emulated without KVM.

use std::fmt::Display;
use std::path::Path;
use std::process::Command;

use super::image::Image;
use crate::workspace;

/// Where the firmware puts the CXL memory window: behind the end of the machine's memory and the host bridge's
/// registers, on a boundary of 256 MiB. `dcm` reads it from the CEDT; the kernel has to be told on its
/// command line, before there is anyone to read.
const WINDOW_BASE: u64 = 0x1_1000_0000;
/// Bytes of dynamic capacity, in one DC region, and of the window that it appears in.
const WINDOW: u64 = 1 << 30;
/// The machine's own memory. Up to 2 GiB lie below 4 GiB, which the base of the window rests on.
const MEMORY: &str = "2G";
/// The device, as QMP knows it.
pub(super) const DEVICE: &str = "/machine/peripheral/dcd0";
/// The port's name that the guest looks for.
pub(super) const PORT: &str = "dcmalloc.checks";
/// The same for a port that is a monitor of QEMU's.
pub(super) const MONITOR: &str = "dcmalloc.qmp";

/// A machine that runs `command` under the host's own files and then switches itself off.
pub(super) fn qemu(image: &Image, qmp: &Path, command: &[&str]) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    let mut option = |name: &str, value: &dyn Display| {
        qemu.arg(name).arg(value.to_string());
    };
    option("-machine", &"q35,cxl=on");
    option("-accel", &"tcg,thread=multi");
    // String instructions reach the window byte by byte, a hundred times slower than other code: without
    // these flags nobody prefers them.
    option("-cpu", &"max,-erms,-fsrm,-fzrm,-fsrs,-fsrc");
    option("-smp", &2);
    option("-m", &MEMORY);
    // In a machine that has NUMA nodes the window becomes one more, which `kmem` needs.
    option(
        "-object",
        &format!("memory-backend-ram,id=ram0,size={MEMORY}"),
    );
    option("-numa", &"node,memdev=ram0");
    option(
        "-object",
        &format!("memory-backend-ram,id=dc0,size={WINDOW}"),
    );
    option("-device", &"pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl.0");
    option(
        "-device",
        &"cxl-rp,port=0,bus=cxl.0,id=rp0,chassis=0,slot=2",
    );
    option(
        "-device",
        &"cxl-type3,bus=rp0,volatile-dc-memdev=dc0,num-dc-regions=1,id=dcd0,sn=0x1234",
    );
    option(
        "-machine",
        &format!("cxl-fmw.0.targets.0=cxl.0,cxl-fmw.0.size={WINDOW}"),
    );
    option(
        "-fsdev",
        &"local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
    );
    option(
        "-device",
        &"virtio-9p-pci,fsdev=host,mount_tag=host,bus=pcie.0",
    );
    option("-kernel", &image.kernel.display());
    option("-initrd", &image.initrd.display());
    // What the kernel does not know it puts into the environment of its first process.
    option(
        "-append",
        &format!(
            "console=ttyS0 quiet panic=-1 memhp_default_state=offline \
             memmap={WINDOW:#x}%{WINDOW_BASE:#x}+0xefffffff MODULES={} CARGO_TARGET_DIR={} -- {}",
            image.modules.display(),
            workspace::target().display(),
            command.join(" ")
        ),
    );
    option(
        "-qmp",
        &format!("unix:{},server=on,wait=off", qmp.display()),
    );
    qemu.args(["-nodefaults", "-display", "none", "-no-reboot"]);
    qemu
}

/// Adds what the checks need to `qemu`: a line to the runner in the guest, at the socket `port`; a port of the
/// guest that is a monitor, by way of the socket `monitor`; and a file for what the console says.
pub(super) fn equip(qemu: &mut Command, port: &Path, monitor: &Path, console: &Path) {
    let mut option = |name: &str, value: String| {
        qemu.arg(name).arg(value);
    };
    let (port, monitor) = (port.display(), monitor.display());
    option("-device", "virtio-serial-pci,bus=pcie.0".into());
    for (id, path, name) in [("port", &port, PORT), ("monitor", &monitor, MONITOR)] {
        option(
            "-chardev",
            format!("socket,id={id},path={path},server=on,wait=off"),
        );
        option(
            "-device",
            format!("virtserialport,chardev={id},name={name}"),
        );
    }
    option("-chardev", format!("socket,id=qmp,path={monitor}"));
    option("-mon", "chardev=qmp,mode=control".into());
    option("-serial", format!("file:{}", console.display()));
}
