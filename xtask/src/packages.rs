//! Debian packages that a task needs: there, installed, or asked for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::{process, workspace};

/// Whether dpkg knows `package` as installed.
fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .output()
        .is_ok_and(|output| output.status.success() && output.stdout == b"installed")
}

/// Makes sure of `packages`: installs what is missing when run by root, and otherwise says what to install.
pub(crate) fn ensure(packages: &[&str]) -> Result<()> {
    let is_root = rustix::process::geteuid().is_root();
    match lacking(packages, installed, is_root)? {
        missing if missing.is_empty() => Ok(()),
        missing => install(&missing.join(" "), &missing),
    }
}

/// Which of `packages` are not `installed`, for root, who can change that; anybody else is told what to do.
fn lacking<'a>(
    packages: &[&'a str],
    installed: impl Fn(&str) -> bool,
    is_root: bool,
) -> Result<Vec<&'a str>> {
    let mut missing = packages.to_vec();
    missing.retain(|package| !installed(package));
    if !missing.is_empty() && !is_root {
        let list = missing.join(" ");
        bail!("Debian packages are missing; as root: apt-get install {list}");
    }
    Ok(missing)
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

/// The installed version of `package`.
pub(crate) fn version(package: &str) -> Result<String> {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${Package} ${Version}", package])
        .output()?;
    ensure!(output.status.success(), "{package} is not installed");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The source of `package`, downloaded, unpacked and patched as Debian builds it; where it lies.
pub(crate) fn source(package: &str) -> Result<PathBuf> {
    let place = workspace::target().join("sources");
    let done = place.join(package);
    if done.is_dir() {
        return Ok(done);
    }
    ensure(&["dpkg-dev"])?;
    know_sources()?;
    fs::create_dir_all(&place)?;
    eprintln!("downloading the source of {package}");
    let mut download = apt(&["source", "--download-only", package]);
    download
        .current_dir(&place)
        .args(["-o", "APT::Sandbox::User=root"]);
    ensure!(
        process::run_visibly(&mut download)?,
        "apt-get source {package} failed"
    );
    let start = format!("{package}_");
    let mut descriptions = Vec::new();
    for entry in fs::read_dir(&place)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(&start) && name.ends_with(".dsc") {
            descriptions.push(path);
        }
    }
    descriptions.sort();
    let description = descriptions.last();
    let description = description.with_context(|| format!("apt-get left no {start}*.dsc"))?;
    // Under its last name only when it is complete.
    let unfinished = place.join(format!("{package}.unpacking"));
    let _ = fs::remove_dir_all(&unfinished);
    let mut unpack = Command::new("dpkg-source");
    unpack
        .args(["--no-check", "-q", "-x"])
        .arg(description)
        .arg(&unfinished);
    ensure!(
        process::run_visibly(&mut unpack)?,
        "dpkg-source failed on {}",
        description.display()
    );
    fs::rename(&unfinished, &done)?;
    Ok(done)
}

/// The version of the source that [`source`] gives.
pub(crate) fn source_version(package: &str) -> Result<String> {
    let changelog = source(package)?.join("debian/changelog");
    let text = fs::read_to_string(&changelog)?;
    let version = text.split(['(', ')']).nth(1);
    let version = version.with_context(|| format!("{} names none", changelog.display()))?;
    Ok(format!("{package} {version}, source"))
}

/// Makes sure of `package` as the backports have it.
pub(crate) fn ensure_backport(package: &str) -> Result<()> {
    if installed(package) {
        return Ok(());
    }
    let suite = backports()?;
    if !rustix::process::geteuid().is_root() {
        bail!(
            "{package} is missing; as root, with the sources line \"{}\": apt-get install -t {suite} {package}",
            sources_line(&suite)
        );
    }
    know(&suite)?;
    install(package, &["-t", &suite, package])
}

/// Makes this release's sources known to apt.
fn know_sources() -> Result<()> {
    let targets = Command::new("apt-get")
        .args(["indextargets", "--format", "$(CREATED_BY)"])
        .output()?;
    if String::from_utf8_lossy(&targets.stdout)
        .lines()
        .any(|line| line == "Sources")
    {
        return Ok(());
    }
    let codename = codename()?;
    let line = format!("deb-src http://deb.debian.org/debian {codename} main");
    add_line(&format!("{codename}-source"), &line)
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

/// The name of this Debian release.
fn codename() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release")?;
    release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(str::to_owned)
        .context("/etc/os-release names no release")
}

/// The backports suite of this Debian release.
fn backports() -> Result<String> {
    Ok(format!("{}-backports", codename()?))
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
    add_line(suite, &sources_line(suite))
}

/// Adds a line to apt's sources, in a file of its own.
fn add_line(name: &str, line: &str) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("as root, add \"{line}\" to the sources of apt, then: apt-get update");
    }
    let file = format!("/etc/apt/sources.list.d/{name}.list");
    fs::write(file, format!("{line}\n"))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_not_root_is_told_what_to_install() {
        let there = |package: &str| package == "gcc";
        let wanted = ["redis-server", "gcc", "sqlite3"];
        let missing = lacking(&wanted, there, true).unwrap();
        assert_eq!(missing, ["redis-server", "sqlite3"]);
        let error = lacking(&wanted, there, false).unwrap_err().to_string();
        assert!(
            error.ends_with("as root: apt-get install redis-server sqlite3"),
            "{error}"
        );
        let nothing: [&str; 0] = [];
        assert_eq!(lacking(&["gcc"], there, false).unwrap(), nothing);
    }
}
