//! The kernel, and the initial file system: busybox, the modules that the guest needs, and our first process.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{packages, process, workspace};

/// What is needed to make one, besides the kernel.
const PACKAGES: &[&str] = &["busybox-static", "cpio", "kmod", "xz-utils"];

/// Modules in the order in which they are loaded, each after those that it uses. A kernel that has one built
/// in has no file of it.
const MODULES: &[&str] = &[
    "uio",
    "uio_pci_generic",
    "device_dax",
    "dax_hmem",
    "netfs",
    "9pnet",
    "9pnet_virtio",
    "9p",
    "overlay",
];

const INIT: &str = include_str!("../../guest/init");

/// What QEMU boots.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    /// What is `/lib/modules` in the guest.
    pub(super) modules: PathBuf,
}

impl Image {
    /// The kernel's package, which a guest was started with already.
    pub(super) fn kernel_version() -> Result<String> {
        let package = kernel_package()?;
        let name = package.file_name().unwrap_or_default().to_string_lossy();
        let mut parts = name.split('_');
        let (name, version) = (parts.next(), parts.next());
        let version = version.unwrap_or_default().replace("%3a", ":");
        Ok(format!("{} {version}", name.unwrap_or_default()))
    }
}

fn kernel_package() -> Result<PathBuf> {
    packages::download_backport("linux-image-amd64", &directory().join("packages"))
}

/// Fetches the kernel, unless it is there, and packs the initial file system.
pub(super) fn make() -> Result<Image> {
    packages::ensure(PACKAGES)?;
    let dir = directory();
    let package = kernel_package()?;
    let unpacked = dir.join(package.file_stem().unwrap_or_default());
    if !unpacked.is_dir() {
        unpack(&package, &unpacked)?;
    }
    let initrd = dir.join("initrd");
    pack(&unpacked, &initrd)?;
    Ok(Image {
        kernel: file_named(&unpacked.join("boot"), |name| name.starts_with("vmlinuz"))?
            .with_context(|| format!("no kernel in {}", package.display()))?,
        initrd,
        modules: unpacked.join("lib/modules"),
    })
}

/// Where everything about guests lies.
pub(super) fn directory() -> PathBuf {
    workspace::target().join("guest")
}

/// Unpacks `package`, as a whole or not at all.
fn unpack(package: &Path, into: &Path) -> Result<()> {
    let partial = into.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)?;
    }
    let mut dpkg = Command::new("dpkg-deb");
    dpkg.arg("--extract").arg(package).arg(&partial);
    ensure!(
        process::run_visibly(&mut dpkg)?,
        "{} does not unpack",
        package.display()
    );
    for release in fs::read_dir(partial.join("lib/modules"))? {
        let mut depmod = Command::new("depmod");
        depmod
            .arg("--basedir")
            .arg(&partial)
            .arg(release?.file_name());
        ensure!(process::run_visibly(&mut depmod)?, "depmod failed");
    }
    fs::rename(&partial, into)?;
    Ok(())
}

fn pack(kernel: &Path, initrd: &Path) -> Result<()> {
    let root = tempfile::tempdir()?;
    let modules = root.path().join("modules");
    for dir in ["bin", "proc", "sys", "dev", "modules"] {
        fs::create_dir(root.path().join(dir))?;
    }
    fs::copy("/bin/busybox", root.path().join("bin/busybox"))?;
    let init = root.path().join("init");
    fs::write(&init, INIT)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let mut order = String::new();
    for module in MODULES {
        let is_it = |name: &str| {
            name.split_once(".ko")
                .is_some_and(|(stem, _)| stem == *module)
        };
        let Some(file) = file_named(&kernel.join("lib/modules"), is_it)? else {
            continue;
        };
        copy_plain(&file, &modules.join(format!("{module}.ko")))?;
        order += module;
        order += "\n";
    }
    fs::write(modules.join("order"), order)?;
    // Written beside and renamed: another guest may be starting from the old one.
    let fresh = tempfile::NamedTempFile::new_in(initrd.parent().unwrap_or(root.path()))?;
    let mut cpio = Command::new("sh");
    cpio.current_dir(root.path())
        .args(["-c", "find . | cpio --quiet --create --format=newc"])
        .stdout(Stdio::from(fresh.as_file().try_clone()?));
    ensure!(process::run_visibly(&mut cpio)?, "cpio failed");
    fresh.persist(initrd)?;
    Ok(())
}

/// Copies a module, decompressed.
fn copy_plain(from: &Path, to: &Path) -> Result<()> {
    if from.extension().is_some_and(|suffix| suffix == "ko") {
        fs::copy(from, to)?;
        return Ok(());
    }
    let mut xz = Command::new("xz");
    xz.args(["--decompress", "--stdout"])
        .arg(from)
        .stdout(Stdio::from(File::create(to)?));
    ensure!(
        process::run_visibly(&mut xz)?,
        "{} is not compressed with xz",
        from.display()
    );
    Ok(())
}

/// The first file below `dir` whose name `is_it`.
fn file_named(dir: &Path, is_it: impl Fn(&str) -> bool + Copy) -> Result<Option<PathBuf>> {
    for entry in fs::read_dir(dir).with_context(|| format!("no {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            if let Some(found) = file_named(&entry.path(), is_it)? {
                return Ok(Some(found));
            }
        } else if entry.file_name().to_str().is_some_and(is_it) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}
