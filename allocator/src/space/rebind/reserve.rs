//! Mappings held back for the moment when the kernel allows no more.
//!
//! A process has at most `vm.max_map_count` mappings, and a move splits and
//! merges some. When the last are taken between a granule's content being
//! taken away and its backing being put in place, giving these up lets the
//! move end.
#![forbid(unsafe_code)]

use super::PAGE;
use super::staging::{advise, map_nothing, unmap};
use rustix::io::Errno;
use rustix::mm::Advice;

/// More than a run of granules, given in the worst order, splits off, and
/// the few that mremap(2) wants to be free.
const MAPPINGS: usize = 40;

/// Pages without access, every other one a mapping of its own.
#[derive(Debug)]
pub(super) struct Reserve {
    at: usize,
}

impl Reserve {
    pub(super) fn fill() -> Result<Self, Errno> {
        let reserve = Self {
            at: map_nothing(MAPPINGS * PAGE)?,
        };
        for page in (0..MAPPINGS).step_by(2) {
            // Any advice that differs from the neighbour's keeps them apart.
            advise(reserve.at + page * PAGE, PAGE, Advice::LinuxDontDump)?;
        }
        Ok(reserve)
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        unmap(self.at, MAPPINGS * PAGE);
    }
}
