//! What readers are told: man pages that render, and every command and code block of the pages, run as written.

use anyhow::{Result, ensure};

use super::Tally;
use crate::{docs, man, packages, process, workspace};

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["gcc", "libc6-dev", "sqlite3", "python3"])?;
    let mut tally = docs::try_pages(&[])?;
    let share = man::share();
    tally.check(
        "man pages and completions",
        man::write(&share).and_then(|()| {
            ensure!(man::check(&share)? > 5, "there are hardly any");
            Ok(())
        }),
    );
    let mut doctests = workspace::cargo();
    doctests.args(["test", "--quiet", "--doc", "--package", "dcmalloc-examples"]);
    if process::run_visibly(&mut doctests)? {
        tally.pass();
    } else {
        tally.fail("Rust of the pages", "see above");
    }
    Ok(tally)
}
