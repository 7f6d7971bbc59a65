//! Debian packages that a task needs: there, installed, or asked for.

use std::process::Command;

use anyhow::{Result, bail};

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
    eprintln!("installing {list}");
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .arg("-qq")
            .args(args);
        // Services that a package starts by itself are not wanted.
        command.env("RUNLEVEL", "1");
        process::run_visibly(&mut command)
    };
    let mut install = vec!["install", "--yes", "--no-install-recommends"];
    install.extend(&missing);
    if !(apt(&["update"])? && apt(&install)?) {
        bail!("apt-get install {list} failed");
    }
    Ok(())
}
