//! cargo-fuzz, which builds the targets with a sanitizer and libFuzzer.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::{packages, process, workspace};

const NAME: &str = "cargo-fuzz";
/// The release that is installed where there is none.
const VERSION: &str = "0.13.2";

/// The program: one of the machine's, or our own in `target`, which is installed first if need be.
pub(super) fn find_or_install() -> Result<PathBuf> {
    // libFuzzer is C++.
    packages::ensure(&["g++"])?;
    let path = env::var_os("PATH").unwrap_or_default();
    let mut known = env::split_paths(&path).map(|dir| dir.join(NAME));
    if let Some(found) = known.find(|program| program.is_file()) {
        return Ok(found);
    }
    let root = workspace::target().join("tools");
    let ours = root.join("bin").join(NAME);
    if !ours.is_file() {
        eprintln!(
            "{NAME} is missing: installing release {VERSION} into {}",
            root.display()
        );
        let mut install = workspace::cargo();
        install.args([
            "install",
            "--quiet",
            "--locked",
            "--version",
            VERSION,
            "--root",
        ]);
        ensure!(
            process::run_visibly(install.arg(&root).arg(NAME))?,
            "{NAME} is missing and can't be installed, for the reason above: \
             `cargo install --locked {NAME}` where there is a network"
        );
    }
    Ok(ours)
}

/// `cargo fuzz VERB TARGET`. A sanitizer is for nightly toolchains only, unless a stable one is told otherwise.
pub(super) fn command(tool: &Path, verb: &str, target: &str) -> Command {
    let mut command = Command::new(tool);
    command
        .current_dir(workspace::root())
        .env("RUSTC_BOOTSTRAP", "1")
        .args(["fuzz", verb, "--fuzz-dir", "fuzz", "--target-dir"])
        .arg(workspace::target().join("fuzz"))
        .arg(target);
    command
}
