//! Who held what, over the last minutes.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use dax_backend::broker::map::MapState;
use dax_backend::broker::status::Status;
use serde::Serialize;

/// Looks kept: five minutes of them.
const KEPT: usize = 600;
/// Pieces that the device is cut into.
const ROWS: u64 = 128;

/// Kinds of pieces that nobody holds; who holds one is given by process id.
const ABSENT: i64 = -1;
const DIRTY: i64 = -2;
const FREE: i64 = -3;
const OUTGOING: i64 = -4;

/// The last looks at a broker.
#[derive(Debug, Default)]
pub(super) struct History {
    samples: VecDeque<Sample>,
    last: u64,
}

/// A look, small.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Sample {
    /// Number of the look, from 1.
    id: u64,
    /// Milliseconds since 1970.
    at: u64,
    /// The device from its lowest address up: how many of [`ROWS`] pieces, and
    /// what they are: a process id, or less than 0.
    map: Vec<(u64, i64)>,
    leased: u64,
    free: u64,
    /// Granules moved off extents and back, by all processes together so far.
    moved: (u64, u64),
}

impl History {
    /// Keeps a look.
    pub(super) fn add(&mut self, status: &Status) {
        self.last += 1;
        if self.samples.len() == KEPT {
            self.samples.pop_front();
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.samples.push_back(Sample {
            id: self.last,
            at: now.map_or(0, |now| now.as_millis() as u64),
            map: strip(status),
            leased: status.capacity.leased,
            free: status.capacity.free,
            moved: (
                status.total.evacuated_granules,
                status.total.promoted_granules,
            ),
        });
    }

    /// The looks after number `id`.
    pub(super) fn since(&self, id: u64) -> Vec<Sample> {
        let newer = self.samples.iter().filter(|sample| sample.id > id);
        newer.cloned().collect()
    }
}

/// The device as a strip of [`ROWS`] pieces, each as what lies in its middle.
fn strip(status: &Status) -> Vec<(u64, i64)> {
    let device = &status.device.span;
    let mut strip: Vec<(u64, i64)> = Vec::new();
    for row in 0..ROWS {
        let middle =
            (u128::from(device.len) * u128::from(2 * row + 1) / u128::from(2 * ROWS)) as u64;
        let kind = kind_at(status, device.dpa.0.saturating_add(middle));
        match strip.last_mut() {
            Some((count, last)) if *last == kind => *count += 1,
            _ => strip.push((1, kind)),
        }
    }
    strip
}

fn kind_at(status: &Status, dpa: u64) -> i64 {
    let extent = status.extents.iter().find(|extent| {
        let start = extent.span.dpa.0;
        (start..start.saturating_add(extent.span.len)).contains(&dpa)
    });
    let Some(extent) = extent else {
        return ABSENT;
    };
    let mut left = dpa - extent.span.dpa.0;
    for run in &extent.map {
        if left < run.len {
            return match (run.outgoing, run.state, run.pid) {
                (true, ..) => OUTGOING,
                (_, MapState::Lost | MapState::Broken, _) => OUTGOING,
                (_, MapState::Leased, pid) => i64::from(pid.unwrap_or(0)),
                (_, MapState::Dirty, _) => DIRTY,
                (_, MapState::Clean | MapState::Warm | MapState::Shared, _) => FREE,
            };
        }
        left -= run.len;
    }
    ABSENT
}
