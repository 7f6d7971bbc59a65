//! The measurements, in the guest.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest};
use dax_backend::broker::status::Status;

use super::super::check::Check;
use super::super::check::served::{LIMIT, MIB, Served, mib};
use super::super::inside::Guest;
use super::super::port::Piece;
use crate::process::{self, Background};
use crate::{broker, workspace};

pub(in super::super) const ALL: &[Check] = &[
    Check {
        name: "bench-offer",
        shows: "from an offer to memory that a program can have, and mailbox commands on the way",
        full: false,
        run: offer,
    },
    Check {
        name: "bench-copy",
        shows: "evacuation against memcpy on the same memory",
        full: false,
        run: copy,
    },
    Check {
        name: "bench-kv",
        shows: "a key-value workload on window memory against DRAM",
        full: false,
        run: key_values,
    },
];

/// Where the C programs are built.
pub(super) fn programs() -> PathBuf {
    workspace::target().join("guest/programs")
}

/// Groups of one, two, four and eight extents of 2 MiB, which is as many records as QEMU's log has.
fn offer(guest: &Guest) -> Result<()> {
    const ROUNDS: usize = 7;
    let served = Served::with(guest, &[])?;
    let admin = AdminClient::connect(&served.broker.socket())?;
    for extents in [1, 2, 4, 8] {
        let pieces: Vec<Piece> = (0..extents).map(|i| mib(8 * i, 2)).collect();
        let bytes = extents * 2 * MIB;
        let (mut accepted, mut usable, mut commands) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let before = status(&admin)?.device.counters.commands;
            let start = Instant::now();
            guest.add(0, &pieces)?;
            until(&admin, |status| status.capacity.accepted == bytes)?;
            accepted.push(milliseconds(start.elapsed()));
            let after = until(&admin, |status| status.capacity.clean == bytes)?;
            usable.push(milliseconds(start.elapsed()));
            commands.push((after.device.counters.commands - before) as f64 / extents as f64);
            served.give_back()?;
        }
        let case = |what: &str| format!("{what}, extents in the group: {extents}");
        guest.measured("offer", &case("accepted"), "ms", accepted);
        guest.measured("offer", &case("usable"), "ms", usable);
        guest.measured("offer", &case("commands"), "commands per extent", commands);
    }
    drop(admin);
    served.leave()
}

/// One block on extents is copied by memcpy, then taken from under its program, then copied from DRAM.
fn copy(guest: &Guest) -> Result<()> {
    const ROUNDS: usize = 3;
    let mut rates = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        let served = Served::with(guest, &[mib(0, 16)])?;
        let dir = tempfile::tempdir()?;
        let taken = dir.path().join("taken");
        let program = programs().join("copy");
        let mut copy = Background::start(served.broker.run(&program).arg("8").arg(&taken))?;
        copy.wait_for("ready", LIMIT)?;
        let receipt = served.lose(guest, &[mib(0, 16)])?;
        fs::write(&taken, "")?;
        let finished = copy.finish(LIMIT)?;
        ensure!(finished.success(), "copy: {}", finished.stderr.trim());
        let copied = broker::number(&receipt, "/copied")?;
        ensure!(copied >= 8 * MIB, "only {copied} bytes were moved");
        let microseconds = broker::number(&receipt, "/moving_us")?;
        rates[0].push(value(&finished.stdout, "out_mib_per_second")?);
        rates[1].push(value(&finished.stdout, "in_mib_per_second")?);
        rates[2].push(copied as f64 / MIB as f64 * 1e6 / microseconds as f64);
        rates[3].push(value(&finished.stdout, "moved_out_mib_per_second")?);
        served.leave()?;
    }
    let cases = [
        "memcpy window to DRAM",
        "memcpy DRAM to window",
        "evacuation window to DRAM",
        "memcpy DRAM to DRAM",
    ];
    for (case, samples) in cases.into_iter().zip(rates) {
        guest.measured("copy", case, "MiB per second", samples);
    }
    Ok(())
}

/// The same library and program, with its heap here or there.
fn key_values(guest: &Guest) -> Result<()> {
    const ROUNDS: usize = 3;
    let served = Served::with(guest, &[mib(0, 16)])?;
    let cases = [("dram", "DRAM"), ("dc", "window")];
    let mut rates = [const { Vec::new() }; 2];
    for _ in 0..ROUNDS {
        for ((placement, _), rates) in cases.iter().zip(&mut rates) {
            let before = served.number("/counters/granted_bytes")?;
            let mut kv = Command::new(workspace::dcm());
            kv.args(["run", "--placement", placement, "--socket"])
                .arg(served.broker.socket())
                .arg("--")
                .arg(programs().join("kv"))
                .arg("5");
            let finished = process::run(&mut kv, LIMIT)?;
            ensure!(finished.success(), "kv: {}", finished.stderr.trim());
            let granted = served.number("/counters/granted_bytes")? - before;
            ensure!(
                (granted >= 2 * MIB) == (*placement == "dc"),
                "{granted} bytes of extents were leased with placement {placement}"
            );
            rates.push(value(&finished.stdout, "ops_per_second")?);
        }
    }
    for ((_, case), samples) in cases.into_iter().zip(rates) {
        guest.measured("kv", case, "operations per second", samples);
    }
    served.leave()
}

/// A `name value` line of a program.
fn value(output: &str, name: &str) -> Result<f64> {
    let mut lines = output.lines().filter_map(|line| line.split_once(' '));
    let (_, value) = lines
        .find(|(found, _)| *found == name)
        .with_context(|| format!("no {name} in {output:?}"))?;
    Ok(value.trim().parse()?)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Asked without another process, whose start takes longer than what is measured.
fn status(admin: &AdminClient) -> Result<Status> {
    match admin.ask(&AdminRequest::Status, LIMIT)? {
        AdminReply::Status(status) => Ok(*status),
        other => bail!("the broker answers {other:?}"),
    }
}

fn until(admin: &AdminClient, is_it: impl Fn(&Status) -> bool) -> Result<Status> {
    let start = Instant::now();
    loop {
        let status = status(admin)?;
        if is_it(&status) {
            return Ok(status);
        }
        ensure!(start.elapsed() < LIMIT, "still {:?}", status.capacity);
        thread::sleep(Duration::from_millis(1));
    }
}
