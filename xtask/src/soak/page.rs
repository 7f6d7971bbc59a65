//! The table of `docs/soak.md`.

use anyhow::Result;

use super::Part;
use crate::page::{self, Page};

const PAGE: Page = Page {
    file: "docs/soak.md",
    rule: "|---|---|---|---|---|---|---|",
};

/// What came of one part.
#[derive(Debug)]
pub(super) struct Report {
    /// What it said of itself, also if it failed.
    pub(super) notes: Vec<String>,
    pub(super) failed: Option<String>,
    pub(super) seconds: f64,
    /// The share of the processors that others had.
    pub(super) others: f64,
}

/// Puts the row of `part` into the table.
pub(super) fn write(part: &Part, report: &Report, revision: &str) -> Result<()> {
    let result = match &report.failed {
        None => "ok".to_owned(),
        Some(reason) => format!("**failed**: {}", page::shortened(reason)),
    };
    PAGE.put(&[
        format!("`{}`", part.name),
        part.what.to_owned(),
        result,
        format!("{:.0}", report.seconds),
        report.notes.join("; "),
        page::machine(report.others)?,
        revision.to_owned(),
    ])
}
