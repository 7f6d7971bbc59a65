//! The preload library's dynamic symbols against the checked-in list. A name too few leaks calls to
//! another heap; a name too many captures what is none of our business.

use std::collections::BTreeSet;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Tally;
use crate::{process, workspace};

const LIST: &str = "ffi/preload/symbols.txt";

pub(super) fn run() -> Result<Tally> {
    let list = std::fs::read_to_string(workspace::root().join(LIST))
        .with_context(|| format!("no {LIST}"))?;
    let wanted: BTreeSet<&str> = list
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|name| !name.is_empty())
        .collect();
    let mut nm = Command::new("nm");
    nm.args(["--dynamic", "--defined-only", "--format=posix"])
        .arg(workspace::preload());
    let finished = process::run(&mut nm, Duration::from_secs(60))?;
    if !finished.success() {
        bail!("nm: {}: {}", finished.ending(), finished.stderr.trim());
    }
    // `name type ...`; absolute symbols are the names of symbol versions.
    let exported: BTreeSet<&str> = finished
        .stdout
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let name = words.next()?;
            (words.next()? != "A").then(|| name.split('@').next().unwrap_or(name))
        })
        .collect();

    let mut tally = Tally::default();
    for name in wanted.union(&exported) {
        match (wanted.contains(name), exported.contains(name)) {
            (true, true) => tally.pass(),
            (true, false) => tally.fail(*name, format!("in {LIST}, but not exported")),
            _ => tally.fail(*name, format!("exported, but not in {LIST}")),
        }
    }
    Ok(tally)
}
