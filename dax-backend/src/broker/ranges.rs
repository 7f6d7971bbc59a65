//! The ranges of one message.
#![forbid(unsafe_code)]

use super::protocol::{MAX_RANGES, WindowRange};

/// Up to [`MAX_RANGES`] ranges, inline: a list that never allocates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranges {
    items: [WindowRange; MAX_RANGES],
    count: usize,
}

impl Default for Ranges {
    fn default() -> Self {
        Self {
            items: [WindowRange { offset: 0, len: 0 }; MAX_RANGES],
            count: 0,
        }
    }
}

impl Ranges {
    /// Appends `range`; `false` when the list is full.
    pub fn push(&mut self, range: WindowRange) -> bool {
        if self.count == MAX_RANGES {
            return false;
        }
        self.items[self.count] = range;
        self.count += 1;
        true
    }

    /// The ranges.
    pub fn as_slice(&self) -> &[WindowRange] {
        &self.items[..self.count]
    }

    /// Bytes in all ranges.
    pub fn bytes(&self) -> u64 {
        self.as_slice()
            .iter()
            .fold(0, |sum, range| sum.saturating_add(range.len))
    }
}
