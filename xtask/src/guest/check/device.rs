//! The fabric manager adds and takes while a broker drives the device.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::super::inside::Guest;
use super::super::port::Piece;
use super::served::{self, LIMIT, MIB, Served, mib};
use crate::process::{self, Background};

/// QEMU's log holds so many records.
const LOG: u64 = 8;

const GROUPS_ANSWERED: &str = "/device/counters/groups_answered";
const ACCEPTED: &str = "/capacity/accepted";

/// A program that fills 4 MiB with what it can tell again, says so, and then changes and checks it until
/// there is a file of the name that it is given.
const HOLDER: &str = "
import os, sys
blocks = [bytearray([i]) * 65536 for i in range(64)]
print('filled', flush=True)
rounds = 0
while rounds == 0 or not os.path.exists(sys.argv[1]):
    for i, block in enumerate(blocks):
        value = (i + rounds) % 256
        assert block.count(value) == 65536, f'block {i} was damaged in round {rounds}'
        block[:] = bytes([(value + 1) % 256]) * 65536
    rounds += 1
print(rounds, 'rounds')
";

pub(super) fn groups(guest: &Guest) -> Result<()> {
    let served = Served::start(guest)?;
    three_extents(guest, &served)?;
    eight_groups(guest, &served)?;
    larger_than_the_log(guest, &served)?;
    served.leave()
}

/// Three extents are offered at once, answered at once, and a program's memory.
fn three_extents(guest: &Guest, served: &Served) -> Result<()> {
    let start = Instant::now();
    guest.add(0, &[mib(0, 2), mib(8, 2), mib(16, 2)])?;
    served.until(ACCEPTED, |accepted| accepted == 6 * MIB)?;
    guest.note(format!(
        "3 extents accepted {} ms after the offer",
        start.elapsed().as_millis()
    ));
    ensure!(served.number(GROUPS_ANSWERED)? == 1, "more than one answer");
    ensure!(
        served.number("/device/counters/answer_commands")? == 1,
        "more than one command"
    );
    ensure!(
        served.number("/device/counters/extents_accepted")? == 3,
        "not three extents"
    );
    let program = "blocks = [bytes([i]) * 200000 for i in range(20)]; \
                   print(sum(block.count(i) for i, block in enumerate(blocks)))";
    let mut python = served.run("/usr/bin/python3.11");
    let finished = process::run(python.args(["-c", program]), LIMIT)?;
    ensure!(
        finished.success() && finished.stdout.trim() == "4000000",
        "{} {} {}",
        finished.ending(),
        finished.stdout,
        finished.stderr.trim()
    );
    let granted = served.number("/counters/granted_bytes")?;
    ensure!(granted >= 4 * MIB, "only {granted} bytes were ever leased");
    Ok(())
}

/// Offers that follow each other at once; each is a group.
fn eight_groups(guest: &Guest, served: &Served) -> Result<()> {
    let before = served.number(GROUPS_ANSWERED)?;
    let accepted = served.number(ACCEPTED)?;
    for group in 0..8 {
        guest.add(0, &[mib(32 + 4 * group, 2)])?;
    }
    served.until(ACCEPTED, |now| now == accepted + 16 * MIB)?;
    let answered = served.number(GROUPS_ANSWERED)? - before;
    ensure!(answered == 8, "{answered} answers for 8 groups");
    Ok(())
}

/// The log loses the tail of a group of twelve, with the record that would end it. The host takes what it has
/// seen in one answer; the rest is not accepted, may be offered again, and what comes next is a new group.
fn larger_than_the_log(guest: &Guest, served: &Served) -> Result<()> {
    let before = served.number(GROUPS_ANSWERED)?;
    let accepted = served.number(ACCEPTED)?;
    let twelve: Vec<Piece> = (0..12).map(|i| mib(128 + 4 * i, 2)).collect();
    guest.add(0, &twelve)?;
    served.until(GROUPS_ANSWERED, |answered| answered > before)?;
    served.until(ACCEPTED, |now| now == accepted + LOG * 2 * MIB)?;
    ensure!(
        served.number("/device/counters/overflows")? == 1,
        "no overflow was seen"
    );
    ensure!(
        guest.add(0, &twelve[..1]).is_err(),
        "the device has not got the first extent among its accepted ones"
    );
    guest
        .add(0, &twelve[LOG as usize..])
        .context("the rest of the group can't be offered again")?;
    served.until(ACCEPTED, |now| now == accepted + 12 * 2 * MIB)?;
    let answered = served.number(GROUPS_ANSWERED)? - before;
    ensure!(answered == 2, "{answered} answers instead of 2");
    Ok(())
}

/// Capacity survives brokers.
pub(super) fn restart(guest: &Guest) -> Result<()> {
    let mut served = Served::with(guest, &[mib(0, 4), mib(8, 4)])?;
    for signal in [Signal::TERM, Signal::KILL] {
        served.broker.end(signal)?;
        served = Served::start(guest)?;
        let accepted = served.number(ACCEPTED)?;
        ensure!(
            accepted == 8 * MIB,
            "{accepted} bytes were adopted after {signal:?}"
        );
        let answered = served.number(GROUPS_ANSWERED)?;
        ensure!(answered == 0, "adopting took {answered} answers");
    }
    // An offer that nobody was there for waits in the log.
    served.broker.end(Signal::KILL)?;
    guest.add(0, &[mib(16, 2)])?;
    let served = Served::start(guest)?;
    served.until(ACCEPTED, |accepted| accepted == 10 * MIB)?;
    served.leave()
}

/// Everything is asked back from under a program, then lent again.
pub(super) fn evacuation(guest: &Guest) -> Result<()> {
    let pieces = [mib(0, 8), mib(16, 8)];
    let served = Served::with(guest, &pieces)?;
    let mut python = served.run("/usr/bin/python3.11");
    let dir = tempfile::tempdir()?;
    let stop = dir.path().join("stop");
    let mut holder = Background::start(python.args(["-c", HOLDER]).arg(&stop))?;
    holder.wait_for("filled", LIMIT)?;
    let leased = served.number("/capacity/leased")?;
    ensure!(leased >= 4 * MIB, "only {leased} bytes are leased");

    let start = Instant::now();
    let mut moved = 0;
    for piece in pieces {
        moved += served::moved(&served.lose(guest, &[piece])?)?;
    }
    guest.note(format!(
        "16 MiB asked back in two goes were gone after {} ms, {} MiB moved live",
        start.elapsed().as_millis(),
        moved / MIB
    ));
    // Which of the two goes found it depends on where the broker had lent from, and where the first went.
    served.has_moved()?;
    // The device says the same: what is still accepted can't be offered.
    guest
        .add(0, &pieces)
        .context("the device still counts it as accepted")?;
    served.until(ACCEPTED, |accepted| accepted == 16 * MIB)?;
    fs::write(&stop, "")?;
    let finished = holder.finish(LIMIT)?;
    ensure!(
        finished.success(),
        "{}: {}",
        finished.ending(),
        finished.stderr.trim()
    );
    guest.note(format!(
        "meanwhile: {}",
        finished.stdout.lines().last().unwrap_or_default()
    ));
    served.leave()
}
