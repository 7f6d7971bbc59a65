//! Memory that is there already with a broker over it.
#![forbid(unsafe_code)]

use std::path::Path;

use anyhow::Context;
use dax_backend::broker::{Broker, BrokerConfig, Window};
use dax_backend::fixed::{fixed, open};

use crate::failure::Failure;
use crate::size::Bytes;

/// Serves all of the memory at `path`, and says what that is.
pub(crate) fn broker(path: &Path, mut config: BrokerConfig) -> Result<(Broker, String), Failure> {
    let memory = open(path)?;
    if memory.is_device {
        // Pages of a device are as large as they get.
        config.warm_reserve = 0;
    }
    let (device, orchestrator) = fixed(memory.len);
    let window = Window::map(memory.fd, 0, memory.len)
        .with_context(|| format!("{} cannot be mapped", path.display()))?;
    let told = format!("{} of {}", Bytes(memory.len), path.display());
    let broker = Broker::new(
        Box::new(device),
        Some(Box::new(orchestrator)),
        window,
        config,
    )?;
    Ok((broker, told))
}
