//! Where a PCI function is: domain, bus, device, function.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The address of a PCI function, written `0000:0d:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Domain, which Linux numbers from 0.
    pub domain: u32,
    /// Bus in the domain.
    pub bus: u8,
    /// Device on the bus, 0 to 31.
    pub device: u8,
    /// Function of the device, 0 to 7.
    pub function: u8,
}

/// A text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is no PCI address: write it as lspci -D does, such as 0000:0d:00.0")]
pub struct BadAddress {
    /// The text.
    pub text: String,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl FromStr for PciAddress {
    type Err = BadAddress;

    /// Reads `0000:0d:00.0`; the domain may be left out if it is 0.
    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let parse = || {
            let (rest, function) = text.rsplit_once('.')?;
            let mut parts = rest.rsplit(':');
            let hex = |part: Option<&str>| u32::from_str_radix(part?, 16).ok();
            let device = u8::try_from(hex(parts.next())?).ok()?;
            let bus = u8::try_from(hex(parts.next())?).ok()?;
            let domain = match parts.next() {
                None => 0,
                part => hex(part)?,
            };
            let function = function.parse().ok()?;
            let fits = parts.next().is_none() && device < 32 && function < 8;
            fits.then_some(Self {
                domain,
                bus,
                device,
                function,
            })
        };
        parse().ok_or_else(|| BadAddress { text: text.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["0000:0d:00.0", "0001:ff:1f.7", "10000:e1:00.0"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        let short: PciAddress = "0d:00.1".parse().unwrap();
        assert_eq!(short.to_string(), "0000:0d:00.1");
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for text in [
            "",
            "0d:00",
            "0d:20.0",
            "0d:00.8",
            "x:00.0",
            "1:0:0d:00.0",
            "100:00.0",
            "/etc",
        ] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
    }
}
