//! `dcm doctor`: what this machine has and lacks for running, and what mends it.

mod broker;
mod device;
mod finding;
mod machine;
mod rights;

use std::path::PathBuf;

use clap::Args;
use dax_backend::window::Platform;
use serde::Serialize;

use crate::failure::Failure;
use crate::orders::{print, print_json};
pub(crate) use finding::{Finding, Verdict};
use machine::Machine;

/// Options of `dcm doctor`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The findings, as JSON
    #[arg(long)]
    json: bool,
    /// The broker's socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    missing: usize,
    hints: usize,
    findings: &'a [Finding],
}

/// Looks, prints what was found, and answers 1 if something is missing.
pub(crate) fn doctor(options: &Options) -> Result<u8, Failure> {
    let machine = Machine::real();
    let mut findings = rights::look(&machine);
    findings.extend(machine::look(&machine));
    findings.extend(device::look(&Platform::default()));
    findings.extend(broker::look(options.socket.as_deref()));
    let count = |verdict| findings.iter().filter(|f| f.verdict == verdict).count();
    let (missing, hints) = (count(Verdict::Missing), count(Verdict::Hint));
    if options.json {
        print_json(&Report {
            missing,
            hints,
            findings: &findings,
        })?;
    } else {
        let mut text: String = findings.iter().map(Finding::to_string).collect();
        text += &match (missing, hints) {
            (0, 0) => "\nnothing is missing\n".to_owned(),
            (0, hints) => format!("\nnothing is missing, {hints} could be better\n"),
            (missing, hints) => format!("\n{missing} missing, {hints} could be better\n"),
        };
        print(&text)?;
    }
    Ok(u8::from(missing > 0))
}
