//! A software device with a broker over it.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use dax_backend::broker::{Broker, BrokerConfig, GRANULE, Window};
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::extent::ExtentTag;
use dax_backend::model::{ModelConfig, SoftwareDevice};
use dax_backend::orchestrator::Orchestrator;

use crate::failure::Failure;
use crate::size::Bytes;

/// Checks the sizes of a software device and of the extents it offers at once.
pub(crate) fn check(size: u64, offer: &[u64]) -> Result<(), Failure> {
    for bytes in offer.iter().chain([&size]) {
        if !bytes.is_multiple_of(GRANULE) {
            return Err(Failure::Usage(format!(
                "{bytes} bytes are not a multiple of the device's 2M blocks"
            )));
        }
    }
    let offered = offer
        .iter()
        .try_fold(0u64, |sum, bytes| sum.checked_add(*bytes));
    if offered.is_none_or(|offered| offered > size) {
        return Err(Failure::Usage(format!(
            "--offer asks for more than the {} of --emulate",
            Bytes(size)
        )));
    }
    Ok(())
}

/// Everything the device has, in up to four extents: enough to see extents
/// fill one after the other, and few enough to read.
pub(crate) fn whole(size: u64) -> Vec<u64> {
    let granules = size / GRANULE;
    let extents = granules.clamp(1, 4);
    (0..extents)
        .map(|i| (granules / extents + u64::from(i < granules % extents)) * GRANULE)
        .collect()
}

/// Makes a software device of `size` bytes, offers it `offer` in one More
/// group, and puts a broker over what was accepted.
pub(crate) fn broker(size: u64, offer: &[u64], config: BrokerConfig) -> anyhow::Result<Broker> {
    let model = SoftwareDevice::new(ModelConfig::one_region(size))
        .context("cannot make the software device's memory")?;
    let mut device = DcDevice::open(model.mmio(), DeviceConfig::default())
        .context("the software device does not open")?;
    let mut fabric = model.fabric();
    if !offer.is_empty() {
        Orchestrator::add(&mut fabric, offer, ExtentTag::NULL)
            .context("the software device does not offer its capacity")?;
        accept(&mut device, offer.iter().sum())?;
    }
    let fd = model
        .memory()
        .try_clone_to_owned()
        .context("no descriptor left for the window")?;
    let window =
        Window::map(fd, 0, device.dc_span().len).context("cannot map the device's memory")?;
    Broker::new(Box::new(device), Some(Box::new(fabric)), window, config)
        .context("no thread left for the device")
}

/// Polls until `bytes` are accepted, so that the first program finds them.
fn accept(device: &mut impl CapacityDevice, bytes: u64) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        for event in device.poll().context("the software device fails")? {
            if let DeviceEvent::Rejected { extents } = event
                && let Some((extent, reason)) = extents.first()
            {
                bail!("the driver rejected {extent}: {reason}");
            }
        }
        let accepted: u64 = device.accepted().iter().map(|e| e.range.len).sum();
        if accepted >= bytes {
            return Ok(());
        }
        if started.elapsed() > Duration::from_secs(5) {
            bail!("only {} of {} arrived", Bytes(accepted), Bytes(bytes));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_device_is_offered_in_few_extents() {
        assert_eq!(whole(1 << 30), [256 << 20; 4]);
        assert_eq!(whole(GRANULE), [GRANULE]);
        assert_eq!(whole(5 * GRANULE).iter().sum::<u64>(), 5 * GRANULE);
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        assert!(check(1 << 30, &[512 << 20, 512 << 20]).is_ok());
        assert_eq!(check(1 << 30, &[GRANULE + 1]).unwrap_err().code(), 2);
        assert_eq!(check(3 << 20, &[]).unwrap_err().code(), 2);
        let error = check(4 << 20, &[2 << 20, 4 << 20]).unwrap_err();
        assert!(error.to_string().contains("more than the 4M"), "{error}");
    }
}
