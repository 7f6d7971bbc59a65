//! The checks that run in a guest with a CXL device, under a stock kernel.

use anyhow::Result;

use super::Tally;
use crate::guest::test;

pub(super) fn run() -> Result<Tally> {
    test::checks()
}
