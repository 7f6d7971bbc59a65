//! The CXL Early Discovery Table of ACPI: host bridges and fixed memory windows (CXL r3.1 9.18.1).

#![forbid(unsafe_code)]

use thiserror::Error;

use crate::address::{Hpa, HpaWindow};

/// What the CEDT says, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cedt {
    /// CXL Host Bridge Structures.
    pub bridges: Vec<HostBridge>,
    /// CXL Fixed Memory Window Structures.
    pub windows: Vec<FixedWindow>,
}

/// A CXL host bridge (CHBS).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostBridge {
    /// ACPI's unique id of it.
    pub uid: u32,
    /// Where its component registers are.
    pub registers: Hpa,
    /// Their length in bytes; 64 KiB from CXL 2.0 on.
    pub len: u64,
}

/// Host addresses that the platform sends to host bridges (CFMWS).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FixedWindow {
    /// Which addresses.
    pub range: HpaWindow,
    /// Unique ids of the host bridges that they are interleaved over.
    pub targets: Vec<u32>,
    /// What may be behind it.
    pub restrictions: u16,
}

impl FixedWindow {
    /// Whether volatile memory of a type 3 device may be behind it: all of it, through the bridge
    /// `uid`.
    pub fn suits(&self, uid: u32) -> bool {
        const HOST_ONLY: u16 = 1 << 1;
        const VOLATILE: u16 = 1 << 2;
        let wanted = HOST_ONLY | VOLATILE;
        self.restrictions & wanted == wanted && self.targets == [uid]
    }
}

/// A table that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the firmware's CEDT is malformed: {reason} at byte {offset}")]
pub struct BadCedt {
    /// What is wrong.
    pub reason: &'static str,
    /// Where.
    pub offset: usize,
}

/// Length of the header that every ACPI table has.
const HEADER: usize = 36;

impl Cedt {
    /// Reads a whole table, header included. Structures of unknown types are passed over.
    ///
    /// # Errors
    /// [`BadCedt`]
    pub fn parse(table: &[u8]) -> Result<Self, BadCedt> {
        let bad = |reason, offset| BadCedt { reason, offset };
        if table.get(..4) != Some(b"CEDT") {
            return Err(bad("the signature is not CEDT", 0));
        }
        let len = field(table, 4, 4).unwrap_or_default() as usize;
        if len < HEADER || len > table.len() {
            return Err(bad("a length that the table does not have", 4));
        }
        let mut cedt = Self::default();
        let mut at = HEADER;
        while at < len {
            let record_len = field(&table[..len], at + 2, 2).unwrap_or_default() as usize;
            let record = table[..len].get(at..at + record_len);
            let Some(record) = record.filter(|record| record.len() >= 4) else {
                return Err(bad("a structure that does not fit", at));
            };
            let short = || bad("a structure that is too short", at);
            match record[0] {
                0 => cedt.bridges.push(bridge(record).ok_or_else(short)?),
                1 => cedt.windows.push(window(record).ok_or_else(short)?),
                _ => {}
            }
            at += record_len;
        }
        Ok(cedt)
    }
}

fn bridge(record: &[u8]) -> Option<HostBridge> {
    Some(HostBridge {
        uid: field(record, 4, 4)? as u32,
        registers: Hpa(field(record, 16, 8)?),
        len: field(record, 24, 8)?,
    })
}

fn window(record: &[u8]) -> Option<FixedWindow> {
    let range = HpaWindow {
        base: Hpa(field(record, 8, 8)?),
        len: field(record, 16, 8)?,
    };
    let ways = match field(record, 24, 1)? {
        code @ 0..=4 => 1 << code,
        code @ 8..=10 => 3 << (code - 8),
        _ => return None,
    };
    let targets = (0..ways).map(|way| field(record, 36 + 4 * way, 4).map(|uid| uid as u32));
    Some(FixedWindow {
        range,
        restrictions: field(record, 32, 2)? as u16,
        targets: targets.collect::<Option<_>>()?,
    })
}

/// A little-endian number of up to 8 bytes.
fn field(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    let mut number = [0; 8];
    number[..len].copy_from_slice(bytes.get(at..at.checked_add(len)?)?);
    Some(u64::from_le_bytes(number))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One bridge, one window of 8 GiB through it, one through two bridges, an unknown structure.
    fn table() -> Vec<u8> {
        let mut table = vec![0; HEADER];
        table[..4].copy_from_slice(b"CEDT");
        let mut chbs = vec![0; 32];
        chbs[2] = 32;
        chbs[4] = 12;
        chbs[16..24].copy_from_slice(&0x4_8000_0000_u64.to_le_bytes());
        chbs[24..32].copy_from_slice(&0x1_0000_u64.to_le_bytes());
        table.extend(chbs);
        for targets in [&[12_u32][..], &[12, 13]] {
            let mut cfmws = vec![0; 36];
            cfmws[0] = 1;
            cfmws[2] = 36 + 4 * targets.len() as u8;
            cfmws[8..16].copy_from_slice(&0x4_9000_0000_u64.to_le_bytes());
            cfmws[16..24].copy_from_slice(&0x2_0000_0000_u64.to_le_bytes());
            cfmws[24] = targets.len() as u8 - 1;
            cfmws[32] = 0x0f;
            table.extend(cfmws);
            table.extend(targets.iter().flat_map(|uid| uid.to_le_bytes()));
        }
        table.extend([9, 0, 4, 0]);
        let len = table.len() as u32;
        table[4..8].copy_from_slice(&len.to_le_bytes());
        table
    }

    #[test]
    fn bridges_and_windows_are_read() {
        let cedt = Cedt::parse(&table()).unwrap();
        let bridge = HostBridge {
            uid: 12,
            registers: Hpa(0x4_8000_0000),
            len: 0x1_0000,
        };
        assert_eq!(cedt.bridges, [bridge]);
        assert_eq!(cedt.windows.len(), 2);
        assert_eq!(cedt.windows[0].range.base, Hpa(0x4_9000_0000));
        assert_eq!(cedt.windows[0].range.len, 8 << 30);
        assert!(cedt.windows[0].suits(12));
        assert!(!cedt.windows[0].suits(13));
        assert!(!cedt.windows[1].suits(12), "interleaved");
    }

    #[test]
    fn nonsense_is_told_by_place() {
        let told = |change: fn(&mut Vec<u8>), offset| {
            let mut table = table();
            change(&mut table);
            assert_eq!(Cedt::parse(&table).unwrap_err().offset, offset);
        };
        told(|table| table[0] = b'X', 0);
        told(|table| table.truncate(100), 4);
        told(|table| table[HEADER + 2] = 0, HEADER);
        told(|table| table[HEADER + 2] = 255, HEADER);
        told(|table| table[HEADER + 32 + 24] = 4, HEADER + 32);
        told(|table| table[HEADER + 32 + 24] = 5, HEADER + 32);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(at in 0..200_usize, bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut table = table();
            for (place, byte) in table.iter_mut().skip(at).zip(bytes) {
                *place = byte;
            }
            let _ = Cedt::parse(&table);
        }
    }
}
