//! The runner in the guest: runs the checks one after the other and tells the host what came of each.

use std::cell::RefCell;
use std::fs;
use std::time::Instant;

use anyhow::{Context, Result};

use super::bench::Row;
use super::check;
use super::plan::Plan;
use super::port::{Line, Outcome, Piece, Port, Verdict};

/// What checks work with.
#[derive(Debug)]
pub(super) struct Guest {
    port: Port,
    pub(super) plan: Plan,
    /// The device's PCI address.
    pub(super) device: String,
    notes: RefCell<Vec<String>>,
    rows: RefCell<Vec<Row>>,
}

impl Guest {
    /// Has the fabric manager offer `pieces` of a DC region as one More group.
    pub(super) fn add(&self, region: u8, pieces: &[Piece]) -> Result<()> {
        let pieces = pieces.to_vec();
        self.port.order(&Line::Add { region, pieces })
    }

    /// Has the fabric manager ask for `pieces` of a DC region back.
    pub(super) fn release(&self, region: u8, pieces: &[Piece]) -> Result<()> {
        let pieces = pieces.to_vec();
        self.port.order(&Line::Release { region, pieces })
    }

    /// A number worth keeping.
    pub(super) fn note(&self, text: impl Into<String>) {
        self.notes.borrow_mut().push(text.into());
    }

    /// Samples of a measurement, for `benches/results`.
    pub(super) fn measured(&self, bench: &str, case: &str, metric: &str, samples: Vec<f64>) {
        self.rows.borrow_mut().push(Row {
            bench: bench.to_owned(),
            case: case.to_owned(),
            metric: metric.to_owned(),
            samples,
        });
    }
}

/// Runs what the plan names. That something failed is for the host to say.
pub(super) fn run() -> Result<bool> {
    let guest = Guest {
        port: Port::open()?,
        plan: Plan::read(&super::plan_file())?,
        device: fs::read_to_string("/run/dcd")
            .context("the machine has no CXL device")?
            .trim()
            .to_owned(),
        notes: RefCell::default(),
        rows: RefCell::default(),
    };
    guest.port.say(&Line::Booted)?;
    for check in check::chosen(&guest.plan) {
        eprintln!("--- {}", check.name);
        let start = Instant::now();
        let outcome = match (check.run)(&guest) {
            Ok(()) => Outcome::Passed,
            Err(error) => Outcome::Failed(format!("{error:#}")),
        };
        eprintln!("{outcome:?}");
        guest.port.say(&Line::Ended(Verdict {
            check: check.name.to_owned(),
            outcome,
            seconds: start.elapsed().as_secs_f64(),
            notes: guest.notes.take(),
            rows: guest.rows.take(),
        }))?;
    }
    guest.port.say(&Line::Done)?;
    Ok(true)
}
