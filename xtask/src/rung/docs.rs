//! rustdoc, with warnings as errors: broken links are what it usually finds.

use anyhow::Result;

use super::Tally;
use crate::{process, workspace};

pub(super) fn run() -> Result<Tally> {
    let mut tally = Tally::default();
    let mut doc = workspace::cargo();
    doc.args([
        "doc",
        "--quiet",
        "--workspace",
        "--no-deps",
        "--document-private-items",
    ])
    .env("RUSTDOCFLAGS", "--deny warnings");
    if process::run_visibly(&mut doc)? {
        tally.pass();
    } else {
        tally.fail("docs", "rustdoc warns; see above");
    }
    Ok(tally)
}
