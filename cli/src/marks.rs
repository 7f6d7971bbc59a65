//! How much free capacity a broker keeps, and whom it asks for more.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use dax_backend::broker::CapacityPolicy;
use dax_backend::orchestrator::qmp::QmpTarget;

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

/// Reads `qmp:SOCKET` or `qmp:SOCKET,/machine/peripheral/NAME`.
pub(crate) fn parse_orchestrator(text: &str) -> Result<QmpTarget, String> {
    let Some(rest) = text.strip_prefix("qmp:").filter(|rest| !rest.is_empty()) else {
        return Err(format!(
            "`{text}` is no orchestrator: write qmp:SOCKET,DEVICE, such as \
             qmp:/run/qemu.sock,/machine/peripheral/dcd0"
        ));
    };
    let (socket, device) = rest.split_once(',').unwrap_or((rest, ""));
    if !device.starts_with('/') {
        return Err(format!(
            "`{text}` names no device: add its path in QEMU's tree, such as \
             {rest},/machine/peripheral/dcd0"
        ));
    }
    Ok(QmpTarget {
        socket: PathBuf::from(socket),
        device: device.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_orchestrator_has_a_socket_and_a_device() {
        let target = parse_orchestrator("qmp:/run/q.sock,/machine/peripheral/dcd0").unwrap();
        assert_eq!(target.socket, PathBuf::from("/run/q.sock"));
        assert_eq!(target.device, "/machine/peripheral/dcd0");
        for (wrong, says) in [
            ("redfish:x", "no orchestrator"),
            ("qmp:", "no orchestrator"),
            ("qmp:/run/q.sock", "no device"),
            ("qmp:/run/q.sock,dcd0", "no device"),
        ] {
            let error = parse_orchestrator(wrong).unwrap_err();
            assert!(error.contains(says), "{wrong}: {error}");
        }
    }
}
