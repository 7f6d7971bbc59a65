//! SQLite's shell on a script that builds, changes and vacuums a database.

use std::time::Duration;

use anyhow::Result;

use super::{Program, Results, Session};
use crate::packages;
use crate::program::sqlite::SCRIPT;

pub(super) const PROGRAM: Program = Program {
    name: "sqlite",
    how: "a script of 200,000 rows, two indexes, updates, deletes, vacuum; output compared line by line",
    short: true,
    prepare: || packages::ensure(&["sqlite3"]),
    version: || packages::version("sqlite3"),
    run,
};

fn run(session: &Session) -> Result<Results> {
    let mut shell = session.command("sqlite3");
    let output = session.succeed(
        shell.args(["-batch", ":memory:", SCRIPT]),
        Duration::from_secs(300),
    )?;
    let mut results = Results::default();
    for (number, line) in output.lines().enumerate() {
        results.add(format!("line {number}"), line);
    }
    Ok(results)
}
