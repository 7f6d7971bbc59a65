//! A line for people: how much of a cache is there, and how well it serves.
#![forbid(unsafe_code)]

use std::time::Duration;

/// Hits and misses of a cache, since it was made.
pub type Reads = (u64, u64);

/// Draws a cache that has `held` of at most `most` bytes, and what came of the reads between
/// `before` and `now`.
pub fn line(at: Duration, held: usize, most: usize, before: Reads, now: Reads) -> String {
    const WIDTH: usize = 32;
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
}
