//! `dcm serve --device` over the guest's device, and programs on it.

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::Value;

use super::super::inside::Guest;
use super::super::port::Piece;
use crate::broker::{self, Broker};

pub(in super::super) const MIB: u64 = 1 << 20;
/// For anything that a broker or a program does. The window is slow, and so may be the machine.
pub(in super::super) const LIMIT: Duration = Duration::from_secs(240);

/// A piece of a DC region, in MiB.
pub(in super::super) fn mib(offset: u64, len: u64) -> Piece {
    Piece {
        offset: offset * MIB,
        len: len * MIB,
    }
}

/// A broker over the device.
#[derive(Debug)]
pub(in super::super) struct Served {
    pub(in super::super) broker: Broker,
}

impl Served {
    pub(in super::super) fn start(guest: &Guest) -> Result<Self> {
        Self::start_with(guest, &[])
    }

    /// The same with further options of `dcm serve`.
    pub(in super::super) fn start_with(guest: &Guest, options: &[&str]) -> Result<Self> {
        let device = ["--device", guest.device.as_str()];
        let broker = Broker::over(&[&device, options].concat(), LIMIT)?;
        Ok(Self { broker })
    }

    /// One that is offered `pieces` of region 0 at once, and has them ready.
    pub(in super::super) fn with(guest: &Guest, pieces: &[Piece]) -> Result<Self> {
        let served = Self::start(guest)?;
        // A check that failed may have left some.
        served.give_back()?;
        if !pieces.is_empty() {
            guest.add(0, pieces)?;
        }
        let bytes: u64 = pieces.iter().map(|piece| piece.len).sum();
        served.until("/capacity/accepted", |accepted| accepted == bytes)?;
        served.until("/capacity/clean", |clean| clean == bytes)?;
        Ok(served)
    }

    /// A number of `dcm status`.
    pub(in super::super) fn number(&self, pointer: &str) -> Result<u64> {
        self.broker.status_number(pointer)
    }

    /// Waits for a number of `dcm status` to be as it should; how long that took.
    pub(in super::super) fn until(
        &self,
        pointer: &str,
        is_it: impl Fn(u64) -> bool,
    ) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let number = self.number(pointer)?;
            if is_it(number) {
                return Ok(start.elapsed());
            }
            ensure!(
                start.elapsed() < LIMIT,
                "{pointer} is still {number} after {} s",
                LIMIT.as_secs()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has the fabric manager ask for `pieces` of region 0 back; the receipt, when they are gone.
    pub(in super::super) fn lose(&self, guest: &Guest, pieces: &[Piece]) -> Result<Value> {
        let accepted = self.number("/capacity/accepted")?;
        let before = self.receipt()?.map_or(0, |(id, _)| id);
        let bytes: u64 = pieces.iter().map(|piece| piece.len).sum();
        guest.release(0, pieces)?;
        self.until("/capacity/accepted", |now| now + bytes == accepted)?;
        let start = Instant::now();
        loop {
            match self.receipt()? {
                Some((id, receipt)) if id > before => return Ok(receipt),
                _ => ensure!(start.elapsed() < LIMIT, "there is no receipt"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The program has moved what it used. A receipt that is written at its deadline does not say so, and a busy
    /// machine may take longer.
    pub(in super::super) fn has_moved(&self) -> Result<()> {
        let moved = "/clients/0/stats/evacuated_granules";
        self.until(moved, |granules| granules > 0).map(drop)
    }

    /// The last receipt, with its number.
    fn receipt(&self) -> Result<Option<(u64, Value)>> {
        let status = self.broker.order_json(&["status"])?;
        let receipts = status["receipts"].as_array().context("no receipts")?;
        let Some(last) = receipts.last() else {
            return Ok(None);
        };
        Ok(Some((broker::number(last, "/id")?, last.clone())))
    }

    /// A program of this machine with its heap on extents.
    pub(in super::super) fn run(&self, program: &str) -> Command {
        self.broker.run(PathBuf::from(program).as_path())
    }

    /// Gives all capacity back, and ends.
    pub(in super::super) fn leave(self) -> Result<()> {
        self.give_back()?;
        self.broker.end(Signal::TERM)
    }

    /// The window's slowness, not the default of `dcm release`, says how long that may take.
    pub(in super::super) fn give_back(&self) -> Result<()> {
        let accepted = self.number("/capacity/accepted")?;
        if accepted > 0 {
            let deadline = (LIMIT / 2).as_millis().to_string();
            let order = ["release", &accepted.to_string(), "--deadline", &deadline];
            let receipt = self.broker.order_json(&order)?;
            let returned = broker::number(&receipt, "/returned")?;
            ensure!(returned == accepted, "only part goes back: {receipt}");
        }
        Ok(())
    }
}

/// Bytes that were moved under their program's pointers, of a receipt.
pub(in super::super) fn moved(receipt: &Value) -> Result<u64> {
    Ok(broker::number(receipt, "/returned_to_extents")?
        + broker::number(receipt, "/returned_to_dram")?)
}
