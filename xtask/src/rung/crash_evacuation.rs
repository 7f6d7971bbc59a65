//! A program that dies by kill -9 somewhere in the evacuation of its heap: leases, pool and the list
//! that the device itself keeps (4801h) agree afterwards, each time.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::crash::{descendant, kill};
use crate::broker::{Broker, number};
use crate::process::Background;

const OFFER: u64 = 512 << 20;
const ROUNDS: u32 = 24;
const PATIENCE: Duration = Duration::from_secs(10);

/// `program` fills its heap, says so and sleeps.
pub(super) fn killed_at_any_point(program: &Path) -> Result<()> {
    let broker = Broker::serve("512M")?;
    // How long the whole of it takes, so that kills fall all over it.
    let mut whole = Duration::ZERO;
    let mut during = 0;
    for round in 0..=ROUNDS {
        let mut victim = Background::start(&mut broker.run(program))?;
        victim.wait_for("filled", Duration::from_secs(30))?;
        let pid = descendant(victim.id(), program)?;
        let start = Instant::now();
        let receipt = thread::scope(|scope| -> Result<Value> {
            let release = scope.spawn(|| {
                let order = ["release", "512M", "--deadline", "20000"];
                let receipt = broker.order_json(&order);
                (receipt, start.elapsed())
            });
            if round > 0 {
                thread::sleep(whole * round / ROUNDS);
                kill(pid)?;
            }
            let (receipt, spent) = release.join().ok().context("the release panicked")?;
            if round == 0 {
                whole = spent;
                kill(pid)?;
            }
            receipt
        })?;
        victim.finish(PATIENCE)?;
        let of = |pointer: &str| number(&receipt, pointer);
        let returned = of("/returned")?;
        let moved = of("/returned_to_dram")?;
        ensure!(
            round > 0 || moved > 100 << 20,
            "nothing was evacuated: {receipt}"
        );
        // One that has answered has said how.
        during += u32::from(moved == 0);
        books_agree(&broker, OFFER - returned)
            .with_context(|| format!("kill {round} of {ROUNDS}, {receipt}"))?;
        if returned > 0 {
            broker.order(&["add", &returned.to_string()])?;
        }
    }
    eprintln!(
        "  {ROUNDS} kills within {} ms of evacuation, {during} of them before the program had answered",
        whole.as_millis()
    );
    ensure!(during > 0, "no kill fell into an evacuation");
    Ok(())
}

/// All of `capacity` is accepted and free, and another driver, which asks the device for its list,
/// finds the very same extents.
fn books_agree(broker: &Broker, capacity: u64) -> Result<()> {
    let start = Instant::now();
    let before = loop {
        let status = broker.order_json(&["status"])?;
        let of = |pointer: &str| number(&status, pointer);
        let settled = of("/capacity/leased")? == 0
            && of("/capacity/outgoing")? == 0
            && status["clients"].as_array().is_some_and(Vec::is_empty);
        if settled && of("/capacity/accepted")? == capacity && of("/capacity/free")? == capacity {
            break status;
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "not {capacity} bytes that are all free: {status}"
        );
        thread::sleep(Duration::from_millis(5));
    };
    kill(number(&before, "/pid")? as u32)?;
    let after = broker.order_json(&["status"])?;
    let list = |status: &Value| -> Vec<Value> {
        let extents = status["extents"].as_array();
        let spans = extents.into_iter().flatten();
        spans
            .map(|e| Value::from(vec![e["dpa"].clone(), e["len"].clone()]))
            .collect()
    };
    ensure!(
        list(&before) == list(&after),
        "the broker had {:?}, the device lists {:?}",
        list(&before),
        list(&after)
    );
    let free = number(&after, "/capacity/free")?;
    ensure!(free == capacity, "{free} bytes are free after a restart");
    Ok(())
}
