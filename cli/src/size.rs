//! Sizes and device ranges as people write them.
#![forbid(unsafe_code)]

use std::fmt;

use dax_backend::broker::admin::ReleaseTarget;
use dax_backend::broker::receipt::{DpaSpan, HexDpa};

/// Reads a size: digits with K, M, G or T after them, powers of 1024.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    if digits.is_empty() {
        return Err(format!(
            "`{text}` is no size: write digits and K, M, G or T, such as 256M"
        ));
    }
    let shift = match unit.strip_suffix("iB").unwrap_or(unit) {
        "" if unit.is_empty() => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ if unit.starts_with('.') => {
            return Err(format!(
                "`{text}` is no whole number: take the next smaller unit"
            ));
        }
        _ => {
            return Err(format!(
                "`{unit}` is no unit: K, M, G and T are (powers of 1024)"
            ));
        }
    };
    let size = digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("`{text}` is more than 64 bits of bytes"))?;
    if size == 0 {
        return Err("a size of 0 makes no sense here".into());
    }
    Ok(size)
}

/// Reads what to release: a size, or `DPA+LENGTH` with the DPA in hex.
pub(crate) fn parse_target(text: &str) -> Result<ReleaseTarget, String> {
    let Some((dpa, len)) = text.split_once('+') else {
        return parse(text).map(ReleaseTarget::Bytes);
    };
    let digits = dpa
        .strip_prefix("0x")
        .ok_or_else(|| format!("`{dpa}` is no device address: write it in hex, 0x…"))?;
    let start = u64::from_str_radix(digits, 16)
        .map_err(|_| format!("`{dpa}` is no hexadecimal address of 64 bits"))?;
    let len = match len.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16)
            .map_err(|_| format!("`{len}` is no hexadecimal length of 64 bits"))?,
        None => parse(len)?,
    };
    Ok(ReleaseTarget::Range(DpaSpan {
        dpa: HexDpa(start),
        len,
    }))
}

/// Bytes for people: exact in up to four digits of a unit, or else with one
/// decimal of the largest unit.
pub(crate) struct Bytes(pub(crate) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K"), (0, "B")];
        let exact = units.into_iter().find(|(shift, _)| {
            let whole = self.0 >> shift;
            (1..10_000).contains(&whole) && whole << shift == self.0
        });
        if let Some((shift, unit)) = exact {
            return f.pad(&format!("{}{unit}", self.0 >> shift));
        }
        let largest = units.into_iter().find(|(shift, _)| self.0 >> shift > 0);
        let Some((shift, unit)) = largest else {
            return f.pad("0B");
        };
        let whole = self.0 >> shift;
        let tenths = (u128::from(self.0 - (whole << shift)) * 10) >> shift;
        f.pad(&format!("{whole}.{tenths}{unit}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("1", 1),
            ("64K", 65_536),
            ("256M", 256 << 20),
            ("256MiB", 256 << 20),
            ("1g", 1 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_its_own_reason() {
        for (text, says) in [
            ("", "digits"),
            ("M", "digits"),
            ("-1M", "digits"),
            ("1.5G", "next smaller unit"),
            ("256MB", "no unit"),
            ("1 G", "no unit"),
            ("10iB", "no unit"),
            ("99999999999T", "64 bits"),
            ("0", "0 makes no sense"),
            ("0G", "0 makes no sense"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_release_names_bytes_or_a_range() {
        assert_eq!(parse_target("4M"), Ok(ReleaseTarget::Bytes(4 << 20)));
        let range = ReleaseTarget::Range(DpaSpan {
            dpa: HexDpa(0x2000_0000),
            len: 2 << 20,
        });
        assert_eq!(parse_target("0x20000000+2M"), Ok(range));
        assert_eq!(parse_target("0x20000000+0x200000"), Ok(range));
        for (text, says) in [
            ("20000000+2M", "in hex"),
            ("0xzz+2M", "hexadecimal address"),
            ("0x10+0xzz", "hexadecimal length"),
            ("0x10+", "digits"),
        ] {
            let error = parse_target(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn bytes_read_well() {
        for (bytes, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1 << 20, "1M"),
            ((3 << 30) / 2, "1536M"),
            ((3 << 40) + 4096, "3.0T"),
            ((1 << 30) - 1, "1023.9M"),
            (u64::MAX, "16777215.9T"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
