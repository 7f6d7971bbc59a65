//! rustdoc, with warnings as errors: broken links are what it usually finds. Private items are documented
//! too, so public text may link to them. And what is public, against the checked-in lists.

use anyhow::Result;

use super::Tally;
use crate::{api, process, workspace};

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
    .env(
        "RUSTDOCFLAGS",
        "--deny warnings --allow rustdoc::private_intra_doc_links",
    );
    if process::run_visibly(&mut doc)? {
        tally.pass();
    } else {
        tally.fail("rustdoc", "rustdoc warns; see above");
    }
    match api::document() {
        Err(error) => tally.fail("api", format!("{error:#}")),
        Ok(()) => {
            for library in &api::LIBRARIES {
                tally.check(library.list, library.check());
            }
        }
    }
    Ok(tally)
}
