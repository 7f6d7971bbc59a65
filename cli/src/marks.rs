//! How much free capacity a broker keeps, and whom it asks for more.
#![forbid(unsafe_code)]

use std::time::Duration;

use clap::Args;
use dax_backend::broker::CapacityPolicy;

use crate::failure::Failure;
use crate::size;

/// Options of `dcm serve`.
#[derive(Debug, Args)]
pub(crate) struct Marks {
    /// Ask the orchestrator for more when less than this is free, or a program lacks some
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    low: Option<u64>,
    /// Give back what has been free above this for a while; twice a step above --low if not given
    #[arg(long, value_name = "SIZE", value_parser = size::parse, requires = "low")]
    high: Option<u64>,
    /// How much to ask for or give back at a time
    #[arg(long, value_name = "SIZE", value_parser = size::parse, requires = "low", default_value = "128M")]
    step: u64,
    /// Wait so long before asking again, and before giving back
    #[arg(long, value_name = "MS", requires = "low", default_value_t = 2000)]
    cool_down: u64,
}

impl Marks {
    /// The policy, if one is wanted.
    pub(crate) fn policy(&self) -> Result<Option<CapacityPolicy>, Failure> {
        let Some(low) = self.low else {
            return Ok(None);
        };
        let policy = CapacityPolicy {
            low,
            high: self
                .high
                .unwrap_or_else(|| low.saturating_add(self.step.saturating_mul(2))),
            step: self.step,
            cool_down: Duration::from_millis(self.cool_down),
        };
        policy
            .check()
            .map_err(|error| Failure::Usage(error.to_string()))?;
        Ok(Some(policy))
    }
}
