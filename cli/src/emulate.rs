//! A software device with a broker over it.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use dax_backend::broker::{Broker, BrokerConfig, GRANULE, Store, Window};
use dax_backend::capacity::{CapacityDevice, DeviceEvent};
use dax_backend::device::{DcDevice, DeviceConfig};
use dax_backend::extent::ExtentTag;
use dax_backend::journal::MemfdJournal;
use dax_backend::mmio::Mmio;
use dax_backend::model::{ModelConfig, ModelRegion, RemoteFabric, RemoteMmio, SoftwareDevice};
use dax_backend::orchestrator::Orchestrator;

use crate::failure::Failure;
use crate::keeper;
use crate::size::Bytes;

/// The DC region of a software device that is sharable, if there is one: the second.
const SHARABLE: u8 = 1 << 1;

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

/// A software device of `size` bytes that offers `offer` in one More group, with `sharable` bytes
/// more that can be shared between hosts.
pub(crate) fn device(size: u64, offer: &[u64], sharable: u64) -> anyhow::Result<SoftwareDevice> {
    let mut config = ModelConfig::one_region(size);
    if sharable > 0 {
        config.dc_regions.push(ModelRegion {
            sharable: true,
            ..ModelRegion::of(sharable)
        });
    }
    let model = SoftwareDevice::new(config).context("cannot make the software device's memory")?;
    if !offer.is_empty() {
        Orchestrator::add(&mut model.fabric(), offer, ExtentTag::NULL)
            .context("the software device does not offer its capacity")?;
    }
    Ok(model)
}

/// A broker over a software device of its own, of which `offer` is accepted.
pub(crate) fn broker(
    size: u64,
    offer: &[u64],
    sharable: u64,
    config: BrokerConfig,
) -> anyhow::Result<Broker> {
    let model = device(size, offer, sharable)?;
    let driver = DeviceConfig {
        sharable_regions: SHARABLE,
        ..DeviceConfig::default()
    };
    let mut device =
        DcDevice::open(model.mmio(), driver).context("the software device does not open")?;
    accept(&mut device, offer.iter().sum())?;
    let memory = model.memory().try_clone_to_owned();
    let memory = memory.context("no descriptor left for the window")?;
    let fabric = Box::new(model.fabric());
    over(device, fabric, memory, config, Store::none())
}

/// A broker over the software device of a keeper. `offered` bytes are waited
/// for, so that the first program finds them.
pub(crate) fn worker(
    mut store: Store,
    offered: u64,
    config: BrokerConfig,
) -> anyhow::Result<Broker> {
    const JOURNAL: &str = "journal";
    let mut take = |name: &str| {
        let fd = store.take(name);
        fd.with_context(|| format!("the keeper has handed over no {name}"))
    };
    let registers = RemoteMmio::new(take(keeper::REGISTERS)?);
    let fabric = Box::new(RemoteFabric::new(take(keeper::FABRIC)?));
    let memory = take(keeper::WINDOW)?;
    let journal = match store.take(JOURNAL) {
        Some(file) => MemfdJournal::open(file)?,
        None => {
            let journal = MemfdJournal::new()?;
            store.keep(JOURNAL, journal.fd());
            journal
        }
    };
    let device = DeviceConfig {
        journal: Box::new(journal),
        sharable_regions: SHARABLE,
        ..DeviceConfig::default()
    };
    let mut device =
        DcDevice::open(registers, device).context("the software device does not open")?;
    if config.restarts == 0 {
        accept(&mut device, offered)?;
    }
    over(device, fabric, memory, config, store)
}

fn over<M: Mmio + 'static>(
    device: DcDevice<M>,
    fabric: Box<dyn Orchestrator>,
    memory: OwnedFd,
    config: BrokerConfig,
    store: Store,
) -> anyhow::Result<Broker> {
    let window =
        Window::map(memory, 0, device.dc_span().len).context("cannot map the device's memory")?;
    Broker::with_store(Box::new(device), Some(fabric), window, config, store)
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
