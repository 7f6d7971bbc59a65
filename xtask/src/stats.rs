//! What `dcm run --stats json` says of the program's memory.

use std::fs;
use std::path::Path;

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
    /// Reads what `dcm run` wrote.
    pub(crate) fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).context("dcm run left no statistics")?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Result<Self> {
        let report: Value = serde_json::from_str(text).context("statistics that are not JSON")?;
        let number = |pointer: &str| {
            report
                .pointer(pointer)
                .and_then(Value::as_u64)
                .with_context(|| format!("the statistics have no {pointer}"))
        };
        Ok(Self {
            processes: number("/processes_total")?,
            live_peak: number("/total/heap_live_peak")?,
            live_peak_on_extents: number("/total/heap_live_peak_on_extents")?,
            extent_held_peak: number("/total/extent_held_peak")?,
        })
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
    fn the_share_is_of_the_peak() {
        let stats = RunStats::parse(JSON).unwrap();
        assert_eq!(stats.share_on_extents(), 0.95);
        assert_eq!(stats.processes, 2);
    }

    #[test]
    fn missing_statistics_are_an_error() {
        assert!(RunStats::parse("").is_err());
        assert!(RunStats::parse("{\"processes_total\": 1}").is_err());
    }
}
