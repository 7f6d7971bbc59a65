//! What the host wants the guest to run, in a file that both see.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::workspace;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Plan {
    /// Names of checks; all when empty.
    pub(super) checks: Vec<String>,
    /// Whether those that take long run too.
    pub(super) full: bool,
    /// Test programs of the crates, by their names.
    pub(super) tests: BTreeMap<String, PathBuf>,
}

impl Plan {
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, serde_json::to_vec_pretty(self)?)?;
        Ok(())
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }
}

/// Builds the test programs that the guest runs; their paths by name.
pub(super) fn build_tests(names: &[(&str, &str)]) -> Result<BTreeMap<String, PathBuf>> {
    let mut build = workspace::cargo();
    build.args(["test", "--quiet", "--no-run", "--message-format", "json"]);
    for (package, test) in names {
        build.args(["--package", package, "--test", test]);
    }
    let output = build.stderr(std::process::Stdio::inherit()).output()?;
    ensure!(output.status.success(), "the tests do not build");
    let mut found = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: Value = serde_json::from_str(line).context("cargo writes no JSON")?;
        if let (Some(path), Some(name)) = (
            message["executable"].as_str(),
            message["target"]["name"].as_str(),
        ) {
            found.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    for (_, test) in names {
        ensure!(found.contains_key(*test), "cargo built no test {test}");
    }
    Ok(found)
}
