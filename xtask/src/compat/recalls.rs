//! A thread that takes part of what is leased every 200 ms, and gives it back at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::broker::{self, Broker};

const PERIOD: Duration = Duration::from_millis(200);
/// Of what is leased, in eighths: what one recall takes. More than the quarter that is wanted, because some of
/// it turns out to be free or idle by then.
const EIGHTHS: u64 = 4;

/// What the recalls of a session brought.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Recalls {
    pub(crate) count: u64,
    /// Bytes held on extents just before each, together.
    pub(crate) held: u64,
    /// Bytes that they took from processes, together.
    pub(crate) taken: u64,
    /// Of these: in use, and moved elsewhere.
    pub(crate) moved: u64,
    /// Bytes that processes refused.
    pub(crate) refused: u64,
    pub(crate) slowest_ms: u64,
}

impl Recalls {
    /// Share of what was held that one recall took, on average.
    pub(crate) fn share(&self) -> f64 {
        self.taken as f64 / (self.held.max(1)) as f64
    }
}

/// The thread.
#[derive(Debug)]
pub(crate) struct Taker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Recalls>>,
}

impl Taker {
    pub(super) fn start(broker: Arc<Broker>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut recalls = Recalls::default();
            let whole = broker.status_number("/capacity/accepted")?;
            for round in 0.. {
                let next = Instant::now() + PERIOD;
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                recalls.once(&broker, whole, round)?;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            Ok(recalls)
        });
        Self { stop, thread }
    }

    pub(super) fn stop(self) -> Result<Recalls> {
        self.stop.store(true, Ordering::Relaxed);
        let recalls = self.thread.join();
        recalls.map_err(|_| anyhow!("the thread that recalls panicked"))?
    }
}

impl Recalls {
    fn once(&mut self, broker: &Broker, whole: u64, round: u64) -> Result<()> {
        let status = broker.order_json(&["status"])?;
        let Some((start, len)) = part(&leased(&status)?, round) else {
            return Ok(());
        };
        let target = format!("{start:#x}+{len}");
        let receipt = broker.order_json(&["release", &target])?;
        let number = |pointer| broker::number(&receipt, pointer);
        let returned = number("/returned")?;
        ensure!(
            returned >= number("/returned_free")?,
            "a receipt that cannot be: {receipt}"
        );
        self.count += 1;
        self.held += broker::number(&status, "/capacity/leased")?;
        self.taken += returned - number("/returned_free")?;
        self.moved += number("/returned_to_extents")? + number("/returned_to_dram")?;
        self.refused += number("/asked")?.saturating_sub(returned);
        self.slowest_ms = self.slowest_ms.max(number("/duration_us")? / 1000);
        let missing = whole.saturating_sub(broker.status_number("/capacity/accepted")?);
        if missing > 0 {
            broker.order(&["add", &missing.to_string()])?;
        }
        Ok(())
    }
}

/// Leased ranges, DPA and length, in rising order.
fn leased(status: &Value) -> Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    for extent in status["extents"].as_array().context("no extents")? {
        let dpa = extent["dpa"]
            .as_str()
            .and_then(|dpa| dpa.strip_prefix("0x"));
        let mut at = u64::from_str_radix(dpa.context("an extent without a DPA")?, 16)?;
        for run in extent["map"]
            .as_array()
            .context("an extent without a map")?
        {
            let len = broker::number(run, "/len")?;
            if run["state"] == "leased" {
                ranges.push((at, len));
            }
            at += len;
        }
    }
    ranges.sort_unstable();
    Ok(ranges)
}

/// The range that holds [`EIGHTHS`] of what is leased, beginning further up each round.
fn part(leased: &[(u64, u64)], round: u64) -> Option<(u64, u64)> {
    const GRANULE: u64 = 2 << 20;
    let total: u64 = leased.iter().map(|(_, len)| len / GRANULE).sum();
    let wanted = (total * EIGHTHS).div_ceil(8);
    let skipped = (total - wanted) * (round % 5) / 4;
    let mut granules = leased
        .iter()
        .flat_map(|(dpa, len)| (*dpa..dpa + len).step_by(GRANULE as usize))
        .skip(skipped as usize)
        .take(wanted as usize);
    let first = granules.next()?;
    let last = granules.last().unwrap_or(first);
    Some((first, last + GRANULE - first))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn rounds_go_through_all_that_is_leased() {
        let leased = [(0, 8 * MIB), (100 * MIB, 8 * MIB)];
        assert_eq!(part(&leased, 0), Some((0, 8 * MIB)));
        assert_eq!(part(&leased, 2), Some((4 * MIB, 100 * MIB)));
        assert_eq!(part(&leased, 4), Some((100 * MIB, 8 * MIB)));
        assert_eq!(part(&[(6 * MIB, 2 * MIB)], 3), Some((6 * MIB, 2 * MIB)));
        assert_eq!(part(&[], 0), None);
    }

    #[test]
    fn the_map_says_what_is_leased() {
        let status = serde_json::json!({"extents": [
            {"dpa": "0x20000000", "map": [{"len": 4 * MIB, "state": "warm"}, {"len": 2 * MIB, "state": "leased"}]},
            {"dpa": "0x10000000", "map": [{"len": 6 * MIB, "state": "leased"}]},
        ]});
        let ranges = leased(&status).unwrap();
        assert_eq!(
            ranges,
            [(0x1000_0000, 6 * MIB), (0x2000_0000 + 4 * MIB, 2 * MIB)]
        );
    }
}
