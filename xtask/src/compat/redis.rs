//! redis from Debian's source, built on the C library's malloc: its own test suite, and a BGSAVE under load.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Program, Results, Scale, Session, session, snapshot};
use crate::{packages, process};

/// As of `all_tests` of redis's test_helper.tcl: all of `unit/type`, and those of persistence and replication.
const SUITE: &[&str] = &[
    "unit/type/string",
    "unit/type/incr",
    "unit/type/list",
    "unit/type/list-2",
    "unit/type/list-3",
    "unit/type/set",
    "unit/type/zset",
    "unit/type/hash",
    "unit/type/stream",
    "unit/type/stream-cgroups",
    "unit/expire",
    "unit/scripting",
    "unit/memefficiency",
    "unit/other",
    "unit/aofrw",
    "integration/rdb",
    "integration/aof",
    "integration/replication",
];

/// Lines that the suite has for a surprise.
const SURPRISE: usize = 12;

pub(super) const PROGRAM: Program = Program {
    name: "redis",
    how: "built with MALLOC=libc; runtest of unit/type, expire, scripting, memefficiency, other, aofrw, \
          integration of rdb, aof and replication; BGSAVE of 500 MiB under write load equals the data set at the \
          fork",
    short: false,
    prepare,
    version: || packages::source_version("redis"),
    run,
};

fn prepare() -> Result<()> {
    packages::ensure(&[
        "gcc",
        "libc6-dev",
        "libhiredis-dev",
        "liblua5.1-0-dev",
        "liblzf-dev",
        "lua-bitop-dev",
        "lua-cjson-dev",
        "make",
        "pkg-config",
        "procps",
        "tcl",
    ])?;
    let mut make = Command::new("make");
    make.current_dir(packages::source("redis")?.join("src"))
        .args(["-s", "-j2", "MALLOC=libc", "USE_SYSTEMD=no"])
        .arg("CPPFLAGS=-I/usr/include/liblzf")
        .arg("LDFLAGS=-Wl,-no-as-needed -ldl -latomic -llzf");
    let finished = process::run(&mut make, Duration::from_secs(900))?;
    ensure!(finished.success(), "{}", session::explain(&make, &finished));
    Ok(())
}

fn server() -> Result<PathBuf> {
    Ok(packages::source("redis")?.join("src/redis-server"))
}

fn run(session: &Session) -> Result<Results> {
    let mut results = Results::default();
    if session.scale == Scale::Short {
        snapshot::judge(session, &server()?, "eager", 100, &mut results)?;
        return Ok(results);
    }
    snapshot::judge(session, &server()?, "eager", 500, &mut results)?;
    let mut suite = session.command("tclsh");
    suite
        .current_dir(packages::source("redis")?)
        .args(["tests/test_helper.tcl", "--clients", "2"]);
    for unit in SUITE {
        suite.args(["--single", unit]);
    }
    let finished = process::run(&mut suite, Duration::from_secs(3600))?;
    ensure!(
        !finished.timed_out,
        "{}",
        session::explain(&suite, &finished)
    );
    read(&finished.stdout, &mut results);
    for line in why_it_ended(&finished.stdout) {
        eprintln!("  {line}");
    }
    results.add("the ending", finished.ending());
    ensure!(
        results.len() > 1000,
        "{}",
        session::explain(&suite, &finished)
    );
    Ok(results)
}

/// Lines such as `[ok]: Consumer group lag (3 ms)`, in colours.
fn read(log: &str, results: &mut Results) {
    for line in log.lines() {
        let line = without_colours(line);
        let Some((outcome, name)) = line
            .strip_prefix('[')
            .and_then(|line| line.split_once("]: "))
        else {
            continue;
        };
        if ["ok", "err", "exception", "ignore", "skip", "timeout"].contains(&outcome) {
            let name = match name.rsplit_once(" (") {
                Some((name, time)) if time.ends_with("s)") => name,
                _ => name,
            };
            results.add(name, outcome);
        }
    }
}

/// What the suite said when it gave up, which it does at the first surprise.
fn why_it_ended(log: &str) -> impl Iterator<Item = String> {
    let lines = log.lines().map(without_colours);
    lines
        .skip_while(|line| !line.starts_with("[exception]"))
        .take(SURPRISE)
}

fn without_colours(line: &str) -> String {
    let mut pieces = line.split('\u{1b}');
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        plain += piece.split_once('m').map_or(piece, |(_, text)| text);
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_the_suite_is_told() {
        let log = "[\u{1b}[0;32;49mok\u{1b}[0m]: DEL\n[\u{1b}[0;31;49mexception\u{1b}[0m]: I/O error\nI/O error";
        let told: Vec<String> = why_it_ended(log).collect();
        assert_eq!(told, ["[exception]: I/O error", "I/O error"]);
        assert_eq!(why_it_ended("[ok]: DEL").count(), 0);
    }

    #[test]
    fn lines_lose_their_colours_and_times() {
        let log = "[\u{1b}[0;32;49mok\u{1b}[0m]: SET (and GET) (3 ms)\n[1/18 done]: unit (2 seconds)\n\
                   [err]: DEL in x.tcl\n";
        let (mut results, mut expected) = (Results::default(), Results::default());
        read(log, &mut results);
        expected.add("SET (and GET)", "ok");
        expected.add("DEL in x.tcl", "err");
        assert_eq!(results, expected);
    }
}
