//! `docs/guest.md`: what the last whole run in the guest said.

use std::fmt::Write as _;
use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use dcmalloc_benches::report;

use super::bench;
use super::image::Image;
use super::port::Outcome;
use super::test::Report;
use crate::workspace;

const FILE: &str = "docs/guest.md";

/// Writes the page anew.
pub(super) fn write(report: &Report, took: Duration) -> Result<()> {
    let revision = report::git_revision();
    let head = format!(
        "Revision {revision}; QEMU {} without KVM; {}; {} processors outside, which others used as well. \
         {:.0} s in all, {:.0} s of it until the guest ran.",
        bench::qemu_version()?,
        Image::kernel_version()?,
        thread::available_parallelism()?.get(),
        took.as_secs_f64(),
        report.boot.as_secs_f64()
    );
    fs::write(workspace::root().join(FILE), page(&head, report))?;
    println!("{FILE} has it");
    Ok(())
}

fn page(head: &str, report: &Report) -> String {
    let mut page = format!(
        "# The last whole run in the guest\n\n`cargo xtask guest test --full` writes this page; \
         [testing.md](testing.md#the-guest) says what the checks show. Times are those of an emulated \
         machine on which an access to the window costs a microsecond: they are told, not judged.\n\n\
         {head}\n\n| check | result | seconds | seen |\n|---|---|---|---|\n"
    );
    for verdict in &report.verdicts {
        let result = match &verdict.outcome {
            Outcome::Passed => "ok".to_owned(),
            Outcome::Failed(reason) => format!("**failed**: {reason}"),
        };
        let cells = [
            result,
            format!("{:.0}", verdict.seconds),
            verdict.notes.join("; "),
        ];
        let cells = cells.map(|cell| cell.replace('|', "/").replace('\n', " "));
        // Writing into a String can't fail.
        let _ = writeln!(page, "| `{}` | {} |", verdict.check, cells.join(" | "));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::super::port::Verdict;
    use super::*;

    #[test]
    fn each_check_is_one_row() {
        let verdict = |check: &str, outcome| Verdict {
            check: check.into(),
            outcome,
            seconds: 1.6,
            notes: vec!["a | b".into(), "c".into()],
            rows: Vec::new(),
        };
        let report = Report {
            verdicts: vec![
                verdict("groups", Outcome::Passed),
                verdict("node", Outcome::Failed("no\nnode".into())),
            ],
            boot: Duration::from_secs(9),
        };
        let page = page("Revision 1.", &report);
        assert!(page.contains("\n\nRevision 1.\n\n| check |"), "{page}");
        assert!(
            page.ends_with(
                "|---|\n| `groups` | ok | 2 | a / b; c |\n| `node` | **failed**: no node | 2 | a / b; c |\n"
            ),
            "{page}"
        );
    }
}
