//! CPython's own tests, every object malloc'd.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Program, Results, Scale, Session, junit};
use crate::{packages, process, workspace};

const INTERPRETER: &str = "/usr/bin/python3.11";
/// Where Debian has the tests, all but those of sqlite3.
const TESTS: &str = "/usr/lib/python3.11/test";
const QUICK: &[&str] = &["test_gc", "test_json", "test_mmap", "test_os"];
const SLOW: &[&str] = &[
    "test_subprocess",
    "test_multiprocessing_fork",
    "test_threading",
    "test_sqlite3",
];

pub(super) const PROGRAM: Program = Program {
    name: "cpython",
    how: "PYTHONMALLOC=malloc; its tests os, subprocess, multiprocessing_fork, threading, mmap, gc, json, \
          sqlite3, case by case",
    short: true,
    prepare,
    version: || packages::version("python3.11"),
    run,
};

fn prepare() -> Result<()> {
    packages::ensure(&["python3.11", "libpython3.11-testsuite"])
}

/// Debian's tests together with those of sqlite3, which are in the source package only; where Python finds them.
fn all_tests() -> Result<PathBuf> {
    let place = workspace::target().join("compat/python");
    let sqlite = place.join("test/test_sqlite3");
    if !sqlite.is_dir() {
        let source = packages::source("python3.11")?;
        fs::create_dir_all(&place)?;
        let mut copy = Command::new("cp");
        copy.args(["-r", "--no-target-directory", TESTS])
            .arg(place.join("test"));
        ensure!(process::run_visibly(&mut copy)?, "cannot copy {TESTS}");
        let mut copy = Command::new("cp");
        copy.arg("-r")
            .arg(source.join("Lib/test/test_sqlite3"))
            .arg(&sqlite);
        ensure!(process::run_visibly(&mut copy)?, "no tests of sqlite3");
    }
    Ok(place)
}

fn run(session: &Session) -> Result<Results> {
    let file = session.dir().join("results.xml");
    let mut python = session.command(INTERPRETER);
    python
        .env("PYTHONMALLOC", "malloc")
        .env("PYTHONHASHSEED", "0")
        .args(["-m", "test", "--junit-xml"])
        .arg(&file)
        .args(QUICK);
    if session.scale == Scale::Whole {
        python.env("PYTHONPATH", all_tests()?).args(SLOW);
    }
    let finished = process::run(&mut python, Duration::from_secs(1500))?;
    ensure!(
        !finished.timed_out,
        "{}",
        super::session::explain(&python, &finished)
    );
    let xml =
        fs::read_to_string(&file).with_context(|| super::session::explain(&python, &finished))?;
    let mut results = Results::default();
    junit::read(&xml, &mut results);
    results.add("the ending", finished.ending());
    Ok(results)
}
