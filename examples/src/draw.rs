//! Lines for people: how much of a cache is there and how well it serves, where a heap lies.
#![forbid(unsafe_code)]

use std::time::Duration;

const WIDTH: usize = 32;

/// Hits and misses of a cache, since it was made.
pub type Reads = (u64, u64);

/// Draws a cache that has `held` of at most `most` bytes, and what came of the reads between
/// `before` and `now`.
pub fn line(at: Duration, held: usize, most: usize, before: Reads, now: Reads) -> String {
    let filled = (held * WIDTH).div_ceil(most.max(1)).min(WIDTH);
    let (hits, misses) = (now.0 - before.0, now.1 - before.1);
    format!(
        "{:.1} s |{}{}| {:3} MiB, {:3} % of reads were hits",
        at.as_secs_f64(),
        "#".repeat(filled),
        " ".repeat(WIDTH - filled),
        held >> 20,
        100 * hits / (hits + misses).max(1)
    )
}

/// Draws a heap that was at most `most` bytes: `#` for what is on extents, `.` for what is in DRAM.
pub fn tiers(on_extents: u64, in_dram: u64, most: u64) -> String {
    let part = |bytes: u64| (bytes * WIDTH as u64).div_ceil(most.max(1)) as usize;
    let extents = part(on_extents).min(WIDTH);
    let dram = part(on_extents + in_dram).min(WIDTH).max(extents) - extents;
    let rest = WIDTH - extents - dram;
    format!(
        "|{}{}{}| {:3} MiB on extents, {:3} MiB in DRAM",
        "#".repeat(extents),
        ".".repeat(dram),
        " ".repeat(rest),
        on_extents >> 20,
        in_dram >> 20
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_is_there_and_what_it_is_good_for() {
        let drawn = line(
            Duration::from_millis(1500),
            8 << 20,
            32 << 20,
            (10, 10),
            (40, 20),
        );
        let expected = format!(
            "1.5 s |########{}|   8 MiB,  75 % of reads were hits",
            " ".repeat(24)
        );
        assert_eq!(drawn, expected);
    }

    #[test]
    fn a_heap_lies_on_extents_and_in_dram() {
        let drawn = tiers(16 << 20, 8 << 20, 32 << 20);
        assert!(drawn.starts_with(&format!(
            "|{}{}{}| ",
            "#".repeat(16),
            ".".repeat(8),
            " ".repeat(8)
        )));
        assert!(
            drawn.ends_with(" 16 MiB on extents,   8 MiB in DRAM"),
            "{drawn}"
        );
        assert!(tiers(1, u64::MAX >> 6, 1).starts_with(&format!("|{}|", "#".repeat(32))));
    }
}
