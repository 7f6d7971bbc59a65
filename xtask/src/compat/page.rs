//! The table of `docs/compatibility.md`.

use anyhow::Result;

use super::row::Row;
use crate::page::{self, Page};

const PAGE: Page = Page {
    file: "docs/compatibility.md",
    rule: "|---|---|---|---|---|---|---|---|",
};

/// Puts `row` into the table, in place of the program's old one.
pub(super) fn write(row: &Row) -> Result<()> {
    let verdict = if row.failures.is_empty() {
        "same".to_owned()
    } else {
        format!("**differs**: {}", page::shortened(&row.failures.join("; ")))
    };
    let mut cells = vec![
        row.program.name.to_owned(),
        row.version.clone(),
        row.program.how.to_owned(),
    ];
    cells.extend(row.cells.iter().cloned());
    cells.push(verdict);
    cells.push(page::revision()?);
    PAGE.put(&cells)
}
