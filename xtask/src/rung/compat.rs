//! The short half of `cargo xtask compat`.

use anyhow::Result;

use super::{Tally, recall};
use crate::compat;

pub(super) fn run() -> Result<Tally> {
    if !recall::live_memory_moves()? {
        let mut tally = Tally::default();
        tally.skip(
            "compat",
            "no userfaultfd here, so that live memory cannot be moved",
        );
        return Ok(tally);
    }
    compat::rung()
}
