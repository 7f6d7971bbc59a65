//! `cargo xtask install --prefix DIR`: `dcm`, the libraries, the headers and what pkg-config needs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::rung::build;
use crate::{process, workspace};

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
    let pkgconfig = lib.join("pkgconfig");
    for dir in [&bin, &lib, &include, &pkgconfig] {
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
