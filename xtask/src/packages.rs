//! Debian packages that a task needs: there, installed, or asked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process;

/// Whether dpkg knows `package` as installed.
fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .output()
        .is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}

/// Makes sure of `packages`: installs what is missing when run by root, and otherwise says what to install.
pub(crate) fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !rustix::process::geteuid().is_root() {
        bail!("Debian packages are missing; as root: apt-get install {list}");
    }
    install(&list, &missing)
}

/// Makes sure of a QEMU with Dynamic Capacity Devices, which Debian 12 has in its backports only.
pub(crate) fn ensure_qemu() -> Result<()> {
    const PACKAGES: [&str; 2] = ["qemu-system-x86", "seabios"];
    if PACKAGES.iter().all(|package| installed(package)) && is_at_least(PACKAGES[0], "1:10.0") {
        return Ok(());
    }
    let suite = backports()?;
    let list = PACKAGES.join(" ");
    if !rustix::process::geteuid().is_root() {
        bail!(
            "QEMU 10.0 or newer is missing; as root, with the sources line \"{}\": \
             apt-get install --no-install-recommends -t {suite} {list}",
            sources_line(&suite)
        );
    }
    know(&suite)?;
    install(&list, &[&["-t", suite.as_str()], &PACKAGES[..]].concat())
}

/// Downloads the newest backported `package` into `dir` without installing it; where it lies then. A package
/// that only depends on the one of the day, as `linux-image-amd64` does, stands for that one.
pub(crate) fn download_backport(package: &str, dir: &Path) -> Result<PathBuf> {
    let suite = backports()?;
    know(&suite)?;
    let newest = depends(package, &suite)?;
    let present = |dir: &Path| -> Result<Option<PathBuf>> {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(&format!("{newest}_")) && name.ends_with(".deb") {
                return Ok(Some(path));
            }
        }
        Ok(None)
    };
    fs::create_dir_all(dir)?;
    if let Some(path) = present(dir)? {
        return Ok(path);
    }
    eprintln!("downloading {newest}");
    let mut download = apt(&["download", &format!("{newest}/{suite}")]);
    // Its own user can't write where it is run, and says so.
    download
        .current_dir(dir)
        .args(["-o", "APT::Sandbox::User=root"]);
    ensure!(
        process::run_visibly(&mut download)?,
        "apt-get download {newest} failed"
    );
    present(dir)?.with_context(|| format!("apt-get download left no {newest}"))
}

/// The one package that `package` depends on, or itself when there is none.
fn depends(package: &str, suite: &str) -> Result<String> {
    let output = Command::new("apt-cache")
        .args(["show", &format!("{package}/{suite}")])
        .output()?;
    ensure!(output.status.success(), "apt knows no {package} in {suite}");
    let text = String::from_utf8_lossy(&output.stdout);
    let dependency = text
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))
        .and_then(|list| list.split([' ', ',']).next());
    Ok(dependency.unwrap_or(package).to_owned())
}

/// The backports suite of this Debian release.
fn backports() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .context("/etc/os-release names no release")?;
    Ok(format!("{codename}-backports"))
}

fn sources_line(suite: &str) -> String {
    format!("deb http://deb.debian.org/debian {suite} main")
}

/// Makes `suite` known to apt; packages come from it only when asked for.
fn know(suite: &str) -> Result<()> {
    let policy = Command::new("apt-cache").arg("policy").output()?;
    if String::from_utf8_lossy(&policy.stdout).contains(suite) {
        return Ok(());
    }
    let line = sources_line(suite);
    if !rustix::process::geteuid().is_root() {
        bail!(
            "apt does not know {suite}; as root, add \"{line}\" to its sources, then: apt-get update"
        );
    }
    fs::write(format!("/etc/apt/sources.list.d/{suite}.list"), line + "\n")?;
    ensure!(
        process::run_visibly(&mut apt(&["update"]))?,
        "apt-get update failed"
    );
    Ok(())
}

/// Whether the installed `package` is of `version` or newer.
fn is_at_least(package: &str, version: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${Version}", package])
        .output()
        .is_ok_and(|output| {
            let installed = String::from_utf8_lossy(&output.stdout).into_owned();
            Command::new("dpkg")
                .args(["--compare-versions", &installed, "ge", version])
                .status()
                .is_ok_and(|status| status.success())
        })
}

fn install(list: &str, args: &[&str]) -> Result<()> {
    eprintln!("installing {list}");
    let arguments = [&["install", "--yes", "--no-install-recommends"], args].concat();
    if !(process::run_visibly(&mut apt(&["update"]))?
        && process::run_visibly(&mut apt(&arguments))?)
    {
        bail!("apt-get install {list} failed");
    }
    Ok(())
}

fn apt(args: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Services that a package starts by itself are not wanted.
        .env("RUNLEVEL", "1")
        .arg("-qq")
        .args(args);
    command
}
