//! `dcm devices`: the CXL memory devices of this machine.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Args;
use dax_backend::pci::sysfs::UIO_DRIVER;
use dax_backend::pci::{PciAddress, PciFunction, Sysfs};

use crate::failure::Failure;

/// Options of `dcm devices`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Take this device from the kernel's driver and give it to uio_pci_generic
    #[arg(long, value_name = "BDF")]
    bind: Option<PciAddress>,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Another tree than /sys
    #[arg(long, hide = true, value_name = "PATH", default_value = "/sys")]
    sysfs: PathBuf,
}

/// Lists devices, after binding one if told to.
pub(crate) fn devices(options: &Options) -> Result<(), Failure> {
    let sysfs = Sysfs::new(&options.sysfs);
    if let Some(address) = options.bind {
        sysfs.bind(&sysfs.cxl_function(address)?)?;
    }
    let devices = sysfs.cxl_devices()?;
    if options.json {
        let rows: Vec<_> = devices.iter().map(row).collect();
        println!("{}", serde_json::Value::from(rows));
        return Ok(());
    }
    if devices.is_empty() {
        println!("no CXL memory device (class 0502, interface 10)");
    }
    for device in devices {
        let driver = match device.driver.as_deref() {
            Some(UIO_DRIVER) => "ready: dcm serve --device".to_owned(),
            Some(driver) => format!("driven by the kernel's {driver}: dcm devices --bind"),
            None => "no driver: dcm devices --bind".to_owned(),
        };
        println!(
            "{}  {:04x}:{:04x}  {driver} {}",
            device.address, device.vendor, device.device, device.address
        );
    }
    Ok(())
}

fn row(device: &PciFunction) -> serde_json::Value {
    serde_json::json!({
        "address": device.address.to_string(),
        "vendor": device.vendor,
        "device": device.device,
        "driver": device.driver,
    })
}
