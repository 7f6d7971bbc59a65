//! `cargo xtask guest`: a machine with a CXL Dynamic Capacity Device under a stock Debian kernel.

mod bench;
mod check;
mod image;
mod inside;
mod machine;
mod page;
mod plan;
mod port;
mod qmp;
pub(crate) mod test;

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;

use crate::{packages, process};

#[derive(Debug, Subcommand)]
pub(crate) enum Task {
    /// A shell in the guest, with the device on uio and its memory on /dev/dax0.0
    Shell,
    /// Run checks in the guest, on a device that a fabric manager outside adds to and takes from
    Test(test::Options),
    /// Measure on the device, into benches/results: counts and ratios
    Bench,
    /// The part of `test` and `bench` that runs in the guest
    #[command(hide = true)]
    Inside,
}

/// Whether all went well.
pub(crate) fn run(task: &Task) -> Result<bool> {
    match task {
        Task::Shell => shell(),
        Task::Test(options) => test::run(options),
        Task::Bench => bench::run(),
        Task::Inside => inside::run(),
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

/// Where the host leaves the plan for the guest.
fn plan_file() -> PathBuf {
    image::directory().join("plan.json")
}
