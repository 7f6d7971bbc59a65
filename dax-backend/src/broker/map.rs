//! Who holds what, as a picture of the device.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::lease::{ClientId, LeaseTable, Slot};
use super::protocol::GRANULE;

/// Most pieces that all maps of a broker have together. Up to that many
/// granules the map is exact; beyond, each piece is as most of its granules are.
pub const MAP_CELLS: usize = 4096;

/// What a part of an extent is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MapState {
    /// Free, waiting to be wiped.
    Dirty,
    /// Free and zero.
    Clean,
    /// Free, zero and present as huge pages.
    Warm,
    /// Leased.
    Leased,
    /// Taken by force, and still mapped by whoever held it.
    Lost,
    /// It faults: only the device may have it.
    Broken,
    /// Shared with other hosts, to be mapped read-only.
    Shared,
}

/// Neighbouring granules of an extent that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapRun {
    /// Bytes.
    pub len: u64,
    /// What they are.
    pub state: MapState,
    /// Who holds them, if somebody does.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub pid: Option<u32>,
    /// On their way back to the device.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub outgoing: bool,
}

/// The map of each extent, in the table's order.
pub(super) fn maps(
    table: &LeaseTable,
    pid_of: impl Fn(ClientId) -> Option<u32>,
) -> Vec<Vec<MapRun>> {
    let granules: usize = table.extents.iter().map(|extent| extent.count).sum();
    let cell = granules.div_ceil(MAP_CELLS).max(1).next_power_of_two();
    let extents = table.extents.iter();
    extents
        .map(|extent| {
            let mut runs: Vec<MapRun> = Vec::new();
            let slots: Vec<usize> = extent.slots().collect();
            for cell in slots.chunks(cell) {
                let len = cell.len() as u64 * GRANULE;
                let Some(((slot, outgoing), _)) = most(table, cell) else {
                    continue;
                };
                let (state, pid) = match slot {
                    Slot::Leased(client) => (MapState::Leased, pid_of(client)),
                    Slot::Warm => (MapState::Warm, None),
                    Slot::Clean => (MapState::Clean, None),
                    Slot::Leaving => (MapState::Clean, None),
                    Slot::Lost(client) => (MapState::Lost, pid_of(client)),
                    Slot::Broken => (MapState::Broken, None),
                    Slot::Shared => (MapState::Shared, None),
                    Slot::SharedLost => (MapState::Lost, None),
                    Slot::Dirty | Slot::Absent => (MapState::Dirty, None),
                };
                let outgoing = outgoing || slot == Slot::Leaving;
                let run = MapRun {
                    len,
                    state,
                    pid,
                    outgoing,
                };
                match runs.last_mut() {
                    Some(last) if (MapRun { len, ..*last }) == run => last.len += len,
                    _ => runs.push(run),
                }
            }
            runs
        })
        .collect()
}

/// What most slots of a cell are; the first of several that are equally frequent.
fn most(table: &LeaseTable, cell: &[usize]) -> Option<((Slot, bool), usize)> {
    let mut kinds: Vec<((Slot, bool), usize)> = Vec::new();
    for &index in cell {
        let kind = (table.slots[index], table.outgoing[index]);
        match kinds.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, count)) => *count += 1,
            None => kinds.push((kind, 1)),
        }
    }
    kinds.into_iter().rev().max_by_key(|(_, count)| *count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{Dpa, DpaRange};
    use crate::broker::ledger::Ledger;
    use crate::extent::{Extent, ExtentTag};

    fn table(granules: u64) -> LeaseTable {
        let range = DpaRange {
            start: Dpa(0),
            len: granules * GRANULE,
        };
        let mut table = LeaseTable::new(range, GRANULE, Ledger::new(granules as usize, 0).unwrap());
        table.sync(&[Extent::untagged(range)], |_| true, |_| false);
        table
    }

    #[test]
    fn a_small_device_is_shown_granule_by_granule() {
        let mut table = table(6);
        table.grant(ClientId(1), 2 * GRANULE, ExtentTag::NULL);
        table.grant(ClientId(2), GRANULE, ExtentTag::NULL);
        table.mark_free(GRANULE);
        let maps = maps(&table, |client| Some(client.0 * 100));
        let runs: Vec<_> = maps[0]
            .iter()
            .map(|run| (run.len / GRANULE, run.state, run.pid, run.outgoing))
            .collect();
        let outgoing = runs
            .iter()
            .filter(|run| run.3)
            .map(|run| run.0)
            .sum::<u64>();
        assert_eq!(runs[0], (2, MapState::Leased, Some(100), false));
        assert_eq!(runs[1], (1, MapState::Leased, Some(200), false));
        assert_eq!(runs.iter().map(|run| run.0).sum::<u64>(), 6);
        assert_eq!(outgoing, 1);
    }

    #[test]
    fn a_large_device_is_shown_in_few_pieces() {
        let granules = 10 * MAP_CELLS as u64;
        let mut table = table(granules);
        // Every granule has another holder than its neighbours.
        for client in 0..granules as u32 {
            table.grant(ClientId(client), GRANULE, ExtentTag::NULL);
        }
        let maps = maps(&table, |client| Some(client.0));
        assert!(maps[0].len() <= MAP_CELLS);
        let bytes: u64 = maps[0].iter().map(|run| run.len).sum();
        assert_eq!(bytes, granules * GRANULE);
    }
}
