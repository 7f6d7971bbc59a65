//! `configure` and `make -j2` build memcached with gcc: many short programs, the objects compared byte by byte.

use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Program, Results, Session};
use crate::{packages, process};

const LIMIT: Duration = Duration::from_secs(600);

pub(super) const PROGRAM: Program = Program {
    name: "make",
    how: "`configure` and `make -j2` of memcached from Debian's source with gcc; every object file and program \
          compared byte by byte, but for those of the build for coverage",
    short: true,
    prepare,
    version: || {
        let [gcc, make] = ["gcc", "make"].map(packages::version);
        Ok(format!("{}, {}", gcc?, make?))
    },
    run,
};

fn prepare() -> Result<()> {
    packages::ensure(&["gcc", "libc6-dev", "libevent-dev", "make", "perl"])?;
    packages::source("memcached").map(drop)
}

fn run(session: &Session) -> Result<Results> {
    let place = session.dir().join("memcached");
    let mut copy = Command::new("cp");
    // With their times, which make goes by.
    copy.arg("-a")
        .arg(packages::source("memcached")?)
        .arg(&place);
    ensure!(process::run_visibly(&mut copy)?, "cannot copy the source");
    let mut build = session.command("sh");
    // No debugging information, which would name the directory.
    build
        .current_dir(&place)
        .args(["-c", "./configure CFLAGS=-O2 && make -j2"]);
    session.succeed(&mut build, LIMIT)?;
    let mut results = Results::default();
    for entry in fs::read_dir(&place)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // The debug build measures coverage: its objects hold the directory and a number by chance.
        let counts = !name.starts_with("memcached_debug-");
        if counts && (name.ends_with(".o") || name == "memcached") {
            let sum = process::run(Command::new("sha256sum").arg(&path), LIMIT)?;
            let sum = sum.stdout.split_whitespace().next().unwrap_or("none");
            results.add(name, sum);
        }
    }
    ensure!(
        results.len() > 20,
        "only {} files were built",
        results.len()
    );
    Ok(results)
}
