//! The libraries' dynamic symbols against the checked-in lists. A name too few leaks calls to another
//! heap, or breaks programs that were linked; a name too many captures what is none of our business.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Tally;
use crate::{install, process, workspace};

const PRELOAD: &str = "ffi/preload/symbols.txt";
const INTERFACE: &str = "ffi/c/symbols.txt";

pub(super) fn run() -> Result<Tally> {
    let prefix = workspace::target().join("faces");
    install::install(&prefix, &prefix)?;
    let mut tally = Tally::default();
    let library = prefix.join("lib/libdcmalloc.so");
    compare(&mut tally, &library, &[INTERFACE])?;
    compare(&mut tally, &workspace::preload(), &[PRELOAD, INTERFACE])?;
    Ok(tally)
}

/// Compares what `library` exports with the names in `lists`.
fn compare(tally: &mut Tally, library: &Path, lists: &[&str]) -> Result<()> {
    let mut text = String::new();
    for list in lists {
        let path = workspace::root().join(list);
        text += &fs::read_to_string(path).with_context(|| format!("no {list}"))?;
    }
    let wanted: BTreeSet<&str> = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|name| !name.is_empty())
        .collect();
    let mut nm = Command::new("nm");
    nm.args(["--dynamic", "--defined-only", "--format=posix"])
        .arg(library);
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

    let what = |name: &str| format!("{name} of {}", library.display());
    for name in wanted.union(&exported) {
        match (wanted.contains(name), exported.contains(name)) {
            (true, true) => tally.pass(),
            (true, false) => tally.fail(what(name), format!("in {lists:?}, but not exported")),
            _ => tally.fail(what(name), format!("exported, but not in {lists:?}")),
        }
    }
    Ok(())
}
