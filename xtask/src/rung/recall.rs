//! Capacity recalled while programs use it: it comes back in full, and the programs notice nothing.

use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Tally, capacity, recall_redis};
use crate::broker::{self, Broker};
use crate::packages;
use crate::process::{self, Background};
use crate::program::sqlite;

const LIMIT: Duration = Duration::from_secs(120);
/// Between giving back what was recalled and recalling it again.
const PAUSE: Duration = Duration::from_millis(100);

pub(super) fn run() -> Result<Tally> {
    packages::ensure(&["gcc", "libc6-dev", "sqlite3"])?;
    let mut tally = Tally::default();
    if !live_memory_moves()? {
        tally.skip(
            "recall",
            "no userfaultfd here, so that live memory cannot be moved",
        );
        return Ok(tally);
    }
    tally.check("sqlite while all its extents come and go", sqlite_goes_on());
    let program = capacity::build()?;
    tally.check(
        "everything recalled after a random nine tenths were freed",
        survivors_move(&program),
    );
    recall_redis::run(&mut tally)?;
    Ok(tally)
}

/// Whether this machine lets a program move its memory, as a client of a broker says of itself.
pub(crate) fn live_memory_moves() -> Result<bool> {
    /// The bit of a client's `degraded_flags` that says no.
    const NO_REBIND: u64 = 1 << 1;
    let broker = Broker::serve("64M")?;
    let sleeper = Background::start(broker.run("sleep".as_ref()).arg("60"))?;
    thread::sleep(Duration::from_millis(500));
    let flags = broker.status_number("/clients/0/stats/degraded_flags")?;
    drop(sleeper);
    Ok(flags & NO_REBIND == 0)
}

/// What a recall of everything brought.
struct Recalled {
    moved: u64,
}

/// Recalls all capacity that the broker has.
fn recall_all(broker: &Broker) -> Result<Recalled> {
    let accepted = broker.status_number("/capacity/accepted")?;
    let receipt = broker.order_json(&["release", &accepted.to_string()])?;
    let returned = broker::number(&receipt, "/returned")?;
    ensure!(
        returned == accepted,
        "{returned} of {accepted} bytes came back: {receipt}"
    );
    Ok(Recalled {
        moved: broker::number(&receipt, "/returned_to_extents")?
            + broker::number(&receipt, "/returned_to_dram")?,
    })
}

fn sqlite_goes_on() -> Result<()> {
    let script = ["-batch", ":memory:", sqlite::SCRIPT];
    let broker = Broker::serve("512M")?;
    let mut shell = Background::start(broker.run("sqlite3".as_ref()).args(script))?;
    let (mut recalls, mut moved) = (0, 0);
    loop {
        thread::sleep(PAUSE);
        if shell.has_ended()? {
            break;
        }
        moved += recall_all(&broker)?.moved;
        recalls += 1;
        broker.order(&["add", "512M"])?;
    }
    let with = shell.finish(LIMIT)?;
    let without = process::run(Command::new("sqlite3").args(script), LIMIT)?;
    ensure!(
        with.success() && with.stdout == without.stdout && with.stderr == without.stderr,
        "{}, or another result: {} {}",
        with.ending(),
        with.stdout.trim(),
        with.stderr.trim()
    );
    eprintln!(
        "  sqlite: {recalls} recalls, {} MiB moved while in use",
        moved >> 20
    );
    ensure!(moved > 0, "nothing was ever moved");
    Ok(())
}

/// Hardly a granule is empty, so only moving returns them; the program checks every object that is left.
fn survivors_move(program: &Path) -> Result<()> {
    let broker = Broker::serve("1G")?;
    let mut program = Background::start(broker.run(program).args(["random", "3"]))?;
    program.wait_for("phase freed", LIMIT)?;
    let held = broker.status_number("/capacity/leased")?;
    let moved = recall_all(&broker)?.moved;
    eprintln!(
        "  survivors of a random free: {} MiB held, {} MiB moved",
        held >> 20,
        moved >> 20
    );
    let finished = program.finish(LIMIT)?;
    ensure!(
        finished.success(),
        "the program: {} {}",
        finished.ending(),
        finished.stderr.trim()
    );
    ensure!(
        moved >= held / 2,
        "only {moved} of {held} bytes held were moved"
    );
    Ok(())
}
