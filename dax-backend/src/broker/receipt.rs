//! What came of asking for memory back.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::outcome::StallTimes;
use super::protocol::RefusalReason;
use crate::address::DpaRange;

/// A run of device memory in reports; the DPA is written in hex.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DpaSpan {
    /// First byte.
    pub dpa: HexDpa,
    /// Bytes.
    pub len: u64,
}

impl From<DpaRange> for DpaSpan {
    fn from(range: DpaRange) -> Self {
        Self {
            dpa: HexDpa(range.start.0),
            len: range.len,
        }
    }
}

/// A device address that serializes as `"0x10000000"`, the way every tool prints it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HexDpa(pub u64);

impl fmt::Display for HexDpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Serialize for HexDpa {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HexDpa {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0x").unwrap_or(&text);
        u64::from_str_radix(digits, 16)
            .map(Self)
            .map_err(|_| serde::de::Error::custom(format!("`{text}` is no hexadecimal address")))
    }
}

/// Who asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// `dcm release`.
    Operator,
    /// A Release Capacity event of the device.
    Device,
    /// A Forced Capacity Release event: nobody was asked.
    Forced,
    /// More was free than the broker's capacity policy keeps.
    Policy,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Operator => "the operator",
            Self::Device => "the device",
            Self::Forced => "force",
            Self::Policy => "the capacity policy",
        })
    }
}

/// Capacity that did not go back, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Where, when the request or the client named it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub dpa: Option<HexDpa>,
    /// Bytes.
    pub len: u64,
    /// Why.
    pub reason: RefusalReason,
    /// The process that keeps it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pid: Option<u32>,
    /// More about it, such as the device's own words.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub detail: Option<String>,
}

/// What came of one recall. `asked` is what was returned plus what was refused;
/// `returned` exceeds `asked` only where blocks or tags had to go back whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Number of the recall, from 1.
    pub id: u64,
    /// Who asked.
    pub origin: Origin,
    /// Bytes asked for.
    pub asked: u64,
    /// Bytes the device has back.
    pub returned: u64,
    /// Of these: not leased to anybody.
    pub returned_free: u64,
    /// Of these: idle in a client.
    pub returned_idle: u64,
    /// Of these: emptied by purging a client's engine.
    pub returned_purged: u64,
    /// Of these: emptied by what programs dropped when asked.
    pub returned_dropped: u64,
    /// Of these: in use, and moved to extents that stay.
    pub returned_to_extents: u64,
    /// Of these: in use, and moved to DRAM.
    pub returned_to_dram: u64,
    /// Of these: in use, and written to a file.
    pub returned_spilled: u64,
    /// What the device has back.
    pub ranges: Vec<DpaSpan>,
    /// What it has not.
    pub refused: Vec<Refusal>,
    /// Live bytes that were copied.
    pub copied: u64,
    /// Microseconds in which memory was moved; of several processes, the longest.
    pub moving_us: u64,
    /// How long threads waited for memory of this recall.
    pub stalls: StallTimes,
    /// From the request to this receipt, in microseconds.
    pub duration_us: u64,
    /// The deadline has passed and the work goes on; `dcm status` shows the
    /// receipt of all of it when it has ended.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub more: bool,
}

impl Receipt {
    /// Bytes refused.
    pub fn refused_bytes(&self) -> u64 {
        self.refused.iter().map(|refusal| refusal.len).sum()
    }

    /// Bytes returned that were in use.
    pub fn moved(&self) -> u64 {
        self.returned_to_extents + self.returned_to_dram + self.returned_spilled
    }

    /// Bytes returned by each step of the chain, in order, with its name.
    pub fn steps(&self) -> [(&'static str, u64); 7] {
        [
            ("free", self.returned_free),
            ("idle", self.returned_idle),
            ("purged", self.returned_purged),
            ("dropped", self.returned_dropped),
            ("moved to extents", self.returned_to_extents),
            ("moved to DRAM", self.returned_to_dram),
            ("spilled", self.returned_spilled),
        ]
    }

    /// Live bytes copied per second of moving, if anything was.
    pub fn bandwidth(&self) -> Option<u64> {
        let bytes = u128::from(self.copied) * 1_000_000;
        let rate = bytes.checked_div(u128::from(self.moving_us))?;
        (rate > 0).then_some(rate as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_travel_in_hex() {
        let span = DpaSpan {
            dpa: HexDpa(0x1000_0000),
            len: 4096,
        };
        let json = serde_json::to_string(&span).unwrap();
        assert_eq!(json, r#"{"dpa":"0x10000000","len":4096}"#);
        assert_eq!(serde_json::from_str::<DpaSpan>(&json).unwrap(), span);
        assert!(serde_json::from_str::<DpaSpan>(r#"{"dpa":"0xg","len":1}"#).is_err());
    }
}
