//! Where the capacity of a broker comes from, by the options that say so.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use dax_backend::broker::{Broker, BrokerConfig};
use dax_backend::pci::PciAddress;

use crate::attach::{self, Attach, Served, Surface};
use crate::dax;
use crate::emulate;
use crate::failure::Failure;
use crate::node::{self, NodeMemory};
use crate::size::{self, Bytes};

/// Options of `dcm serve` and `dcm run`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Source {
    /// Serve a software device of this size
    #[arg(long, value_name = "SIZE", value_parser = size::parse, group = "capacity")]
    emulate: Option<u64>,
    /// Capacity that the software device offers at once, in one group; all of it if not given
    #[arg(long, value_name = "SIZE,…", value_parser = size::parse, value_delimiter = ',', requires = "emulate")]
    offer: Vec<u64>,
    /// Capacity of the software device, besides, that can be shared between hosts (`dcm add --shared`)
    #[arg(long, value_name = "SIZE", value_parser = size::parse, requires = "emulate")]
    sharable: Option<u64>,
    /// Drive the CXL device at this PCI address, which `dcm devices` lists
    #[arg(long, value_name = "BDF", group = "capacity")]
    device: Option<PciAddress>,
    /// Serve memory that is there already: /dev/daxX.Y, or a file on hugetlbfs, tmpfs or a DAX file system
    #[arg(long, value_name = "PATH", group = "capacity")]
    dax: Option<PathBuf>,
    /// Serve so much memory of NUMA node N, such as CXL memory that the kernel has put online
    #[arg(long, value_name = "N,SIZE", group = "capacity", value_parser = node::parse)]
    node: Option<NodeMemory>,
    #[command(flatten)]
    attach: Attach,
}

impl Source {
    /// Whether any capacity was named.
    pub(crate) fn is_given(&self) -> bool {
        self.emulate.is_some() || self.device.is_some() || self.dax.is_some() || self.node.is_some()
    }

    /// Checks what can be checked without touching anything.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match self.emulate {
            Some(size) => {
                emulate::check(size, &self.offer)?;
                emulate::check(self.sharable(), &[])
            }
            None if self.is_given() => Ok(()),
            None => Err(Failure::Usage(
                "say what to serve: --device BDF (`dcm devices` lists them), --dax /dev/daxX.Y, \
                 --node N,SIZE, or a software device, --emulate 1G"
                    .into(),
            )),
        }
    }

    /// The software device that was asked for: its size, and what it offers at once.
    pub(crate) fn emulated(&self) -> Option<(u64, Vec<u64>)> {
        let size = self.emulate?;
        let offer = if self.offer.is_empty() {
            emulate::whole(size)
        } else {
            self.offer.clone()
        };
        Some((size, offer))
    }

    /// How much of the software device can be shared between hosts.
    pub(crate) fn sharable(&self) -> u64 {
        self.sharable.unwrap_or(0)
    }

    /// A broker over it in this process, which makes `surface` of a device.
    pub(crate) fn broker(&self, surface: Surface, config: BrokerConfig) -> Result<Served, Failure> {
        if let Some(address) = self.device {
            return attach::broker(address, &self.attach, surface, config);
        }
        let (broker, told) = self.other(config)?;
        Ok(Served {
            broker,
            told,
            surface: None,
        })
    }

    /// A broker over what is no device of the machine, and what is served, in words.
    fn other(&self, config: BrokerConfig) -> Result<(Broker, String), Failure> {
        if let Some(path) = &self.dax {
            return dax::broker(path, config);
        }
        if let Some(memory) = self.node {
            return node::broker(memory, config);
        }
        let (size, offer) = self.emulated().context("no capacity was named")?;
        let broker = emulate::broker(size, &offer, self.sharable(), config)?;
        let offered = Bytes(offer.iter().sum());
        let served = format!("{offered} of a software device of {}", Bytes(size));
        Ok((broker, served))
    }

    /// The same options, for another `dcm`.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let list = |sizes: &[u64]| {
            let texts: Vec<String> = sizes.iter().map(u64::to_string).collect();
            texts.join(",")
        };
        let mut arguments = Vec::new();
        let mut option = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                arguments.extend([OsString::from(name), OsString::from(value)]);
            }
        };
        option("--emulate", self.emulate.map(|size| size.to_string()));
        let offer = (!self.offer.is_empty()).then(|| list(&self.offer));
        option("--offer", offer);
        option("--sharable", self.sharable.map(|size| size.to_string()));
        option("--device", self.device.map(|address| address.to_string()));
        option("--node", self.node.map(|memory| memory.to_string()));
        if let Some(path) = &self.dax {
            arguments.extend(["--dax".into(), path.into()]);
        }
        arguments.extend(self.attach.arguments());
        arguments
    }
}
