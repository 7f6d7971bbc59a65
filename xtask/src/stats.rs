//! What `dcm run --stats json` says of the program's memory.

use anyhow::{Context, Result};
use serde_json::Value;

/// Sums over all processes of one `dcm run`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RunStats {
    /// Processes that used the library.
    pub(crate) processes: u64,
    /// Live bytes at the heap's peak.
    pub(crate) live_peak: u64,
    /// The part of them on extents.
    pub(crate) live_peak_on_extents: u64,
    /// Bytes of granules held on extents, at most.
    pub(crate) extent_held_peak: u64,
}

impl RunStats {
    /// Splits what a program under `dcm run --stats json` left on stderr into the program's own and the
    /// statistics, which come last.
    pub(crate) fn split_from(stderr: &str) -> Result<(String, Self)> {
        let at = if stderr.starts_with('{') {
            0
        } else {
            stderr.rfind("\n{").context("no statistics on stderr")? + 1
        };
        let (own, json) = stderr.split_at(at);
        let report: Value = serde_json::from_str(json).context("statistics that are not JSON")?;
        let number = |pointer: &str| {
            report
                .pointer(pointer)
                .and_then(Value::as_u64)
                .with_context(|| format!("the statistics have no {pointer}"))
        };
        let stats = Self {
            processes: number("/processes_total")?,
            live_peak: number("/total/heap_live_peak")?,
            live_peak_on_extents: number("/total/heap_live_peak_on_extents")?,
            extent_held_peak: number("/total/extent_held_peak")?,
        };
        Ok((own.to_owned(), stats))
    }

    /// Share of the heap's peak that lay on extents, 0 to 1.
    pub(crate) fn share_on_extents(&self) -> f64 {
        if self.live_peak == 0 {
            0.0
        } else {
            self.live_peak_on_extents as f64 / self.live_peak as f64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSON: &str = r#"{"processes_total": 2, "total": {"heap_live_peak": 1000,
"heap_live_peak_on_extents": 950, "extent_held_peak": 4096}}"#;

    #[test]
    fn the_programs_own_lines_stay() {
        let (own, stats) = RunStats::split_from(&format!("a line\n{{not it\n{JSON}\n")).unwrap();
        assert_eq!(own, "a line\n{not it\n");
        assert_eq!(stats.share_on_extents(), 0.95);
        assert_eq!(stats.processes, 2);
        let (own, _) = RunStats::split_from(JSON).unwrap();
        assert_eq!(own, "");
    }

    #[test]
    fn missing_statistics_are_an_error() {
        assert!(RunStats::split_from("a line\n").is_err());
        assert!(RunStats::split_from("{\"processes_total\": 1}").is_err());
    }
}
