//! The driver's device tests on QEMU's device: the same tests as on the software device, on registers that
//! somebody else wrote.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Tally, unit};
use crate::{packages, process, workspace};

const LIMIT: Duration = Duration::from_secs(900);

pub(super) fn run() -> Result<Tally> {
    packages::ensure_qemu()?;
    let mut test = workspace::cargo();
    test.env("DCM_TEST_DEVICE", "qemu");
    test.args(["test", "-p", "dcmalloc-dax-backend", "--test", "device"]);
    test.args(["--", "--show-output"]);
    let finished = process::run(&mut test, LIMIT)?;
    let tally = unit::count(&finished.stdout);
    if !finished.success() {
        eprintln!("{}\n{}", finished.stdout, finished.stderr);
        ensure!(
            !tally.failed.is_empty(),
            "cargo test: {}",
            finished.ending()
        );
    }
    Ok(tally)
}
