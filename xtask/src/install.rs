//! `cargo xtask install --prefix DIR`: `dcm` with its man pages, completions and systemd units, the
//! libraries, the headers and what pkg-config needs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::rung::build;
use crate::{man, packages, process, workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where bin, lib, include and share are
    #[arg(long, value_name = "DIR", default_value = "/usr/local")]
    prefix: PathBuf,
    /// Write below DIR what is to be moved to the prefix later, as packages are built
    #[arg(long, value_name = "DIR")]
    destdir: Option<PathBuf>,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Changes when a program that was linked must be linked anew.
const SONAME: &str = "libdcmalloc.so.0";
const UNITS: [&str; 2] = ["dcmalloc.service", "dcmalloc.socket"];
/// Where the units of the repository expect `dcm`.
const DCM: &str = "/usr/bin/dcm";

/// Builds everything for release and copies it.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if !build::release()? {
        return Ok(false);
    }
    let prefix = std::path::absolute(&options.prefix)?;
    let root = match &options.destdir {
        Some(dir) => dir.join(prefix.strip_prefix("/").unwrap_or(&prefix)),
        None => prefix.clone(),
    };
    install(&prefix, &root)?;
    println!("installed in {}", root.display());
    Ok(true)
}

/// Copies what has been built to `root`, which will be known as `prefix`.
pub(crate) fn install(prefix: &Path, root: &Path) -> Result<()> {
    let [bin, lib, include] = ["bin", "lib", "include"].map(|dir| root.join(dir));
    let [pkgconfig, units] = ["pkgconfig", "systemd/system"].map(|dir| lib.join(dir));
    for dir in [&bin, &lib, &include, &pkgconfig, &units] {
        fs::create_dir_all(dir).with_context(|| format!("can't make {}", dir.display()))?;
    }
    copy(&workspace::dcm(), &bin.join("dcm"))?;
    copy(&workspace::preload(), &lib.join("libdcmalloc_preload.so"))?;
    let archive = lib.join("libdcmalloc.a");
    copy(&workspace::release("libdcmalloc_c.a"), &archive)?;
    let library = format!("libdcmalloc.so.{VERSION}");
    link(&archive, &lib.join(&library))?;
    for (name, target) in [(SONAME, library.as_str()), ("libdcmalloc.so", SONAME)] {
        let name = lib.join(name);
        let _ = fs::remove_file(&name);
        symlink(target, &name).with_context(|| format!("can't make {}", name.display()))?;
    }
    for header in ["dcmalloc.h", "dcmalloc.hpp"] {
        copy(
            &workspace::root().join("include").join(header),
            &include.join(header),
        )?;
    }
    let template = fs::read_to_string(workspace::root().join("ffi/c/dcmalloc.pc.in"))?;
    let description = template
        .replace("@prefix@", &prefix.display().to_string())
        .replace("@version@", VERSION);
    fs::write(pkgconfig.join("dcmalloc.pc"), description)?;
    let dcm = prefix.join("bin/dcm").display().to_string();
    for name in UNITS {
        let unit = fs::read_to_string(workspace::root().join("cli/systemd").join(name))?;
        fs::write(units.join(name), unit.replace(DCM, &dcm))?;
    }
    man::write(&root.join("share"))
}

/// Whether the pages, completions and units that were installed at `prefix` are good for their readers.
pub(crate) fn check(prefix: &Path) -> Result<()> {
    packages::ensure(&["systemd"])?;
    ensure!(
        man::check(&prefix.join("share"))? > 5,
        "there are hardly any man pages"
    );
    let units = prefix.join("lib/systemd/system");
    let service = fs::read_to_string(units.join("dcmalloc.service"))?;
    let start = format!("ExecStart={} serve", prefix.join("bin/dcm").display());
    ensure!(service.contains(&start), "the service has no {start}");
    let mut verify = Command::new("systemd-analyze");
    verify
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(UNITS.map(|name| units.join(name)));
    let verified = process::run(&mut verify, Duration::from_secs(60))?;
    ensure!(
        verified.success() && verified.stderr.is_empty(),
        "systemd-analyze: {}",
        verified.stderr
    );
    Ok(())
}

/// In a new file, so that a program which runs the old one keeps it.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let _ = fs::remove_file(to);
    fs::copy(from, to)
        .with_context(|| format!("can't copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

/// Makes the shared library of all that is in the archive. Memory that it gave out outlives any dlclose.
fn link(archive: &Path, library: &Path) -> Result<()> {
    let _ = fs::remove_file(library);
    let script = workspace::root().join("ffi/c/libdcmalloc.map");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-Wl,--whole-archive"])
        .arg(archive)
        .args([
            "-Wl,--no-whole-archive",
            "-Wl,--gc-sections",
            "-Wl,-z,nodelete",
            "-Wl,-z,relro,-z,now",
        ])
        .arg(format!("-Wl,-soname,{SONAME}"))
        .arg(format!("-Wl,--version-script={}", script.display()))
        .args(["-lm", "-ldl", "-lpthread", "-lgcc_s", "-o"])
        .arg(library);
    ensure!(
        process::run_visibly(&mut cc)?,
        "cc could not link {}",
        library.display()
    );
    Ok(())
}
