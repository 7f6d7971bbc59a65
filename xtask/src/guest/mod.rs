//! `cargo xtask guest`: a machine with a CXL Dynamic Capacity Device under a stock Debian kernel.

mod image;
mod machine;

use anyhow::Result;
use clap::Subcommand;

use crate::{packages, process};

#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// A shell in the guest, with the device on uio and its memory on /dev/dax0.0
    Shell,
}

/// Whether all went well.
pub(crate) fn run(task: &Task) -> Result<bool> {
    match task {
        Task::Shell => shell(),
    }
}

fn shell() -> Result<bool> {
    packages::ensure_qemu()?;
    let image = image::make()?;
    let dir = tempfile::tempdir()?;
    let qmp = dir.path().join("qmp.sock");
    println!(
        "QMP at {}; leave with \"exit\", or kill the machine with Ctrl-A X",
        qmp.display()
    );
    let mut qemu = machine::qemu(&image, &qmp, &["/bin/bash", "-l"]);
    process::run_visibly(qemu.args(["-serial", "mon:stdio"]))
}
