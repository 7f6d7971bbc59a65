//! A daemon: it forks, closes everything, and its parent exits.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Program, Results, Scale, Session};
use crate::{packages, process, workspace};

const SOURCE: &str = include_str!("daemon.c");
const LIMIT: Duration = Duration::from_secs(120);

pub(super) const PROGRAM: Program = Program {
    name: "daemon",
    how: "forks twice, closes every descriptor, its parents exit; grows to 90 MiB, all of it checked and a third renewed every 20 ms \
          (`xtask/src/compat/daemon.c`)",
    short: true,
    prepare,
    version: || Ok("of this revision".to_owned()),
    run,
};

fn binary() -> PathBuf {
    workspace::target().join("compat/daemon")
}

fn prepare() -> Result<()> {
    packages::ensure(&["gcc", "libc6-dev"])?;
    let source = binary().with_extension("c");
    fs::create_dir_all(workspace::target().join("compat"))?;
    fs::write(&source, SOURCE)?;
    let mut compile = Command::new("cc");
    compile.args(["-O2", "-Wall", "-Wextra", "-Werror", "-o"]);
    compile.arg(binary()).arg(source);
    ensure!(process::run_visibly(&mut compile)?, "cc failed");
    Ok(())
}

fn run(session: &Session) -> Result<Results> {
    let result = session.dir().join("result");
    let seconds = if session.scale == Scale::Short {
        "3"
    } else {
        "10"
    };
    let mut daemon = session.command(binary());
    session.succeed(daemon.arg(&result).arg(seconds), LIMIT)?;
    let end = Instant::now() + LIMIT;
    let said = loop {
        let said = fs::read_to_string(&result).unwrap_or_default();
        if said.ends_with('\n') {
            break said;
        }
        ensure!(Instant::now() < end, "the daemon is gone without a word");
        thread::sleep(Duration::from_millis(20));
    };
    let mut results = Results::default();
    results.add("the daemon's blocks", said.trim());
    Ok(results)
}
