//! A q35 machine with a CXL host bridge, a root port and a Dynamic Capacity Device, emulated without KVM.

use std::path::Path;
use std::process::Command;

use super::image::Image;

/// Where the firmware puts the CXL memory window: behind the end of the machine's memory and the host bridge's
/// registers, on a boundary of 256 MiB. `dcm` reads it from the CEDT; the kernel has to be told on its
/// command line, before there is anyone to read.
const WINDOW_BASE: u64 = 0x1_1000_0000;
/// Bytes of dynamic capacity, in two DC regions, and of the window that they appear in.
const WINDOW: u64 = 1 << 30;
/// The machine's own memory. Up to 2 GiB lie below 4 GiB, which the base of the window rests on.
const MEMORY: &str = "2G";

/// `memory-backend-ram` is taken from the machine only as the guest touches it.
pub(super) fn qemu(image: &Image, qmp: &Path, run: &[&str]) -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "q35,cxl=on", "-accel", "tcg,thread=multi"])
        // String instructions reach the window byte by byte, a hundred times slower than other code: without
        // these two flags nobody prefers them.
        .args(["-cpu", "max,-erms,-fsrm", "-smp", "2", "-m", MEMORY])
        // A machine that has NUMA nodes makes one of the window, which `kmem` needs.
        .args([
            "-object",
            &format!("memory-backend-ram,id=ram0,size={MEMORY}"),
        ])
        .args(["-numa", "node,memdev=ram0"])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args([
            "-object",
            &format!("memory-backend-ram,id=dc0,size={WINDOW}"),
        ])
        .args(["-device", "pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl.0"])
        .args(["-device", "cxl-rp,port=0,bus=cxl.0,id=rp0,chassis=0,slot=2"])
        .args([
            "-device",
            "cxl-type3,bus=rp0,volatile-dc-memdev=dc0,num-dc-regions=2,id=dcd0,sn=0x1234",
        ])
        .args([
            "-machine",
            &format!("cxl-fmw.0.targets.0=cxl.0,cxl-fmw.0.size={WINDOW}"),
        ])
        .args([
            "-fsdev",
            "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        ])
        .args([
            "-device",
            "virtio-9p-pci,fsdev=host,mount_tag=host,bus=pcie.0",
        ])
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", qmp.display()))
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 quiet panic=-1 memhp_default_state=offline \
             MODULES={} memmap={WINDOW:#x}%{WINDOW_BASE:#x}+0xefffffff -- {}",
            image.modules.display(),
            run.join(" ")
        ));
    qemu
}
