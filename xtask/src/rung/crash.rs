//! Programs that die by kill -9: their leases come back, what they wrote is gone, and nothing of a
//! `dcm run` stays behind.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::recall::live_memory_moves;
use super::{Tally, crash_evacuation};
use crate::broker::{Broker, number};
use crate::process::{self, Background};
use crate::program::sqlite;
use crate::{packages, workspace};

const PATIENCE: Duration = Duration::from_secs(1);

/// Fills 200 MiB with a byte, says so and sleeps; or, with `look`, allocates as much without writing and
/// counts pages that are not zero.
const PROGRAM: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
enum { COUNT = 200, BLOCK = 1 << 20 };
int main(int argc, char **argv) {
    (void)argv;
    long dirty = 0;
    for (int i = 0; i < COUNT; i++) {
        char *block = malloc(BLOCK);
        if (!block) return 1;
        if (argc == 1) memset(block, 'S', BLOCK);
        else for (int at = 0; at < BLOCK; at += 512) dirty += block[at] == 'S';
    }
    if (argc == 1) { puts("filled"); fflush(stdout); sleep(60); }
    else printf("dirty %ld\n", dirty);
    return 0;
}
"#;

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["gcc", "libc6-dev", "sqlite3"])?;
    let dir = tempfile::tempdir()?;
    let source = dir.path().join("secret.c");
    fs::write(&source, PROGRAM)?;
    let program = dir.path().join("secret");
    let mut compile = Command::new("cc");
    compile
        .args(["-O2", "-Wall", "-Werror", "-fno-builtin"])
        .arg(&source)
        .arg("-o")
        .arg(&program);
    ensure!(process::run_visibly(&mut compile)?, "cc failed");

    let mut tally = Tally::default();
    tally.check("kill -9 of a client", leases_come_back_clean(&program));
    let evacuation = "kill -9 at any point of an evacuation";
    if live_memory_moves()? {
        tally.check(evacuation, crash_evacuation::killed_at_any_point(&program));
    } else {
        tally.skip(evacuation, "no userfaultfd here");
    }
    tally.check("kill -9 under dcm run", nothing_stays_behind(&program));
    tally.check("kill -9 of the broker", programs_outlive_the_broker());
    Ok(tally)
}

/// The device is just large enough for one, so that the next one gets the same memory.
fn leases_come_back_clean(program: &Path) -> Result<()> {
    let broker = Broker::serve("256M")?;
    let mut victim = Background::start(&mut broker.run(program))?;
    victim.wait_for("filled", Duration::from_secs(30))?;
    let held = broker.status_number("/capacity/leased")?;
    ensure!(held >= 200 << 20, "only {held} bytes were on extents");
    kill(descendant(victim.id(), program)?)?;
    let start = Instant::now();
    while broker.status_number("/capacity/leased")? > 0 {
        ensure!(
            start.elapsed() < PATIENCE,
            "leases are still out {PATIENCE:?} after the kill"
        );
        thread::sleep(Duration::from_millis(10));
    }
    eprintln!(
        "  {} MiB back {} ms after the kill",
        held >> 20,
        start.elapsed().as_millis()
    );
    let ended = victim.finish(Duration::from_secs(10))?;
    ensure!(
        ended.status.code() == Some(128 + 9),
        "dcm run ended with {}",
        ended.ending()
    );

    let next = process::run(broker.run(program).arg("look"), Duration::from_secs(30))?;
    ensure!(
        next.success() && next.stdout == "dirty 0\n",
        "the next client: {} {}",
        next.ending(),
        next.stdout.trim()
    );
    Ok(())
}

/// The broker is killed again and again, idle and in the middle of recalls. The
/// program goes on, what comes next knows its leases, and moves them.
fn programs_outlive_the_broker() -> Result<()> {
    let script = ["-batch", ":memory:", sqlite::SCRIPT];
    let broker = Broker::serve("512M")?;
    let mut shell = Background::start(broker.run("sqlite3".as_ref()).args(script))?;
    let (mut kills, mut moved) = (0, 0);
    while !shell.has_ended()? && kills < 20 {
        thread::sleep(Duration::from_millis(50));
        let pid = broker.status_number("/pid")?;
        thread::scope(|scope| -> Result<()> {
            // Every other one dies in the middle of a recall, whose receipt
            // is then nobody's.
            let recall = (kills % 2 == 1)
                .then(|| scope.spawn(|| drop(broker.order_json(&["release", "512M"]))));
            thread::sleep(Duration::from_millis(20));
            kill(pid as u32)?;
            if let Some(recall) = recall {
                ensure!(recall.join().is_ok(), "the recall panicked");
            }
            Ok(())
        })?;
        kills += 1;
        ensure!(
            broker.status_number("/restarts")? == kills,
            "another broker, after kill {kills}"
        );
        let rejoined = Instant::now();
        while !shell.has_ended()? && broker.status_number("/counters/rejoined")? == 0 {
            ensure!(
                rejoined.elapsed() < Duration::from_secs(10),
                "the program has not come back to the broker after kill {kills}"
            );
            thread::sleep(Duration::from_millis(10));
        }
        let accepted = broker.status_number("/capacity/accepted")?;
        if accepted > 0 {
            let receipt = broker.order_json(&["release", &accepted.to_string()])?;
            ensure!(
                number(&receipt, "/returned")? == accepted,
                "after kill {kills}: {receipt}"
            );
            for step in ["/returned_to_dram", "/returned_to_extents"] {
                moved += number(&receipt, step)?;
            }
        }
        broker.order(&["add", "512M"])?;
    }
    let with = shell.finish(Duration::from_secs(120))?;
    let without = process::run(
        Command::new("sqlite3").args(script),
        Duration::from_secs(120),
    )?;
    ensure!(
        with.success() && with.stdout == without.stdout,
        "{}, or another result: {} {}",
        with.ending(),
        with.stdout.trim(),
        with.stderr.trim()
    );
    eprintln!(
        "  {kills} brokers killed, {} MiB moved by the next ones",
        moved >> 20
    );
    ensure!(kills > 0 && moved > 0, "{kills} kills, {moved} bytes moved");
    let status = broker.order_json(&["status"])?;
    let (accepted, free) = (
        number(&status, "/capacity/accepted")?,
        number(&status, "/capacity/free")?,
    );
    ensure!(accepted == free, "leases are left: {status}");
    Ok(())
}

fn nothing_stays_behind(program: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("run.sock");
    let before = dcm_processes();
    let mut run = Command::new(workspace::dcm());
    run.args(["run", "--emulate", "256M", "--placement", "dc", "--socket"])
        .arg(&socket);
    let mut run = Background::start(run.arg("--").arg(program))?;
    run.wait_for("filled", Duration::from_secs(30))?;
    ensure!(
        socket.exists(),
        "dcm run made no socket at {}",
        socket.display()
    );
    let during = dcm_processes();
    ensure!(
        during.difference(&before).count() >= 2,
        "no broker runs beside dcm run"
    );
    kill(descendant(run.id(), program)?)?;
    let start = Instant::now();
    while !run.has_ended()? {
        ensure!(
            start.elapsed() < 5 * PATIENCE,
            "dcm run goes on after its program was killed"
        );
        thread::sleep(Duration::from_millis(10));
    }
    // The broker holds the device's memfd: when its process is gone, so is that.
    let left: Vec<u32> = wait_until_gone(&during, &before);
    ensure!(left.is_empty(), "processes {left:?} outlive dcm run");
    ensure!(!socket.exists(), "the socket outlives dcm run");
    Ok(())
}

/// What is left after a second of `during` that was not there `before`.
fn wait_until_gone(during: &BTreeSet<u32>, before: &BTreeSet<u32>) -> Vec<u32> {
    let start = Instant::now();
    loop {
        let now = dcm_processes();
        let left: Vec<u32> = during
            .difference(before)
            .filter(|pid| now.contains(pid))
            .copied()
            .collect();
        if left.is_empty() || start.elapsed() > PATIENCE {
            return left;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Every process that executes our `dcm`.
fn dcm_processes() -> BTreeSet<u32> {
    let dcm = fs::canonicalize(workspace::dcm()).unwrap_or_else(|_| workspace::dcm());
    let Ok(processes) = fs::read_dir("/proc") else {
        return BTreeSet::new();
    };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == dcm))
        .collect()
}

/// The child of `parent` that executes `program`.
pub(super) fn descendant(parent: u32, program: &Path) -> Result<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children"))?;
    children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .find(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program))
        .context("dcm run has no child that executes the program")
}

pub(super) fn kill(pid: u32) -> Result<()> {
    let pid = Pid::from_raw(pid.cast_signed()).context("no process id")?;
    Ok(kill_process(pid, Signal::KILL)?)
}
