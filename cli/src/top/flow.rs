//! What changed between two looks at a broker.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use dax_backend::broker::GRANULE;
use dax_backend::broker::status::Status;

/// Looks over which rates are taken.
const LOOKS: usize = 8;

/// The last look, and how things move.
#[derive(Debug, Default)]
pub(super) struct Flow {
    pub(super) status: Option<Status>,
    /// Why the last look failed.
    pub(super) trouble: Option<String>,
    looks: VecDeque<Look>,
    colours: HashMap<u32, usize>,
}

#[derive(Debug)]
struct Look {
    at: Instant,
    /// Granules that each process has moved, off extents and back.
    moved: HashMap<u32, (u64, u64)>,
}

/// Bytes per second.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(super) struct Moves {
    /// Off extents.
    pub(super) out: f64,
    /// Back onto extents.
    pub(super) back: f64,
}

impl Flow {
    /// A look at the broker that succeeded.
    pub(super) fn saw(&mut self, status: Status, at: Instant) {
        self.trouble = None;
        for process in &status.clients {
            let next = self.colours.len();
            self.colours.entry(process.pid).or_insert(next);
        }
        let moved = status.clients.iter().map(|process| {
            let stats = &process.stats;
            (
                process.pid,
                (stats.evacuated_granules, stats.promoted_granules),
            )
        });
        self.looks.push_back(Look {
            at,
            moved: moved.collect(),
        });
        if self.looks.len() > LOOKS {
            self.looks.pop_front();
        }
        self.status = Some(status);
    }

    /// A look that failed; what was seen before stays.
    pub(super) fn lost(&mut self, why: String) {
        self.trouble = Some(why);
        self.looks.clear();
    }

    /// Number of the process among all that were seen: its colour.
    pub(super) fn colour(&self, pid: u32) -> Option<usize> {
        self.colours.get(&pid).copied()
    }

    /// What `pid` moves at the moment.
    pub(super) fn moves(&self, pid: u32) -> Moves {
        let (Some(first), Some(last)) = (self.looks.front(), self.looks.back()) else {
            return Moves::default();
        };
        let seconds = last.at.saturating_duration_since(first.at).as_secs_f64();
        let Some(((out, back), (out_before, back_before))) =
            last.moved.get(&pid).zip(first.moved.get(&pid))
        else {
            return Moves::default();
        };
        if seconds <= 0.0 {
            return Moves::default();
        }
        let rate =
            |now: u64, before: u64| now.saturating_sub(before) as f64 * GRANULE as f64 / seconds;
        Moves {
            out: rate(*out, *out_before),
            back: rate(*back, *back_before),
        }
    }
}
