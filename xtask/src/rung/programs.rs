//! Real programs with their heaps on extents: they say the same as without us.

use anyhow::Result;

use super::Tally;
use crate::{packages, program};

pub(super) fn run() -> Result<Tally> {
    packages::ensure(program::PACKAGES)?;
    let mut tally = Tally::default();
    for (name, judge) in program::ALL {
        eprintln!("{name}");
        tally.check(name, judge());
    }
    Ok(tally)
}
