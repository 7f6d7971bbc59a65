//! The client of a broker that has its leases online as memory of a node.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::memory::{BlockError, MemoryBlocks};
use crate::address::{Dpa, DpaRange, Hpa, HpaWindow};
use crate::broker::{
    BrokerClient, ClientError, ClientPage, FromBroker, RecallOutcome, RefusalReason, Welcome,
    WindowRange,
};

/// How long the kernel may take to empty blocks without capacity. Nobody waits for them.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is asked again to empty blocks that the device has taken, and for how long: recalls
/// wait meanwhile.
const AGAIN: Duration = Duration::from_secs(30);
const PATIENCE_AGAIN: Duration = Duration::from_secs(5);

/// What is leased of a window, and which memory blocks of it are online.
#[derive(Debug)]
pub struct NodeSurface {
    blocks: MemoryBlocks,
    /// Host addresses of the window.
    window: HpaWindow,
    /// In rising order, none touching; offsets into the window.
    held: Vec<DpaRange>,
    /// Blocks that are online, all of which are held.
    online: BTreeSet<u64>,
    /// What the device has taken by force and is held still: its blocks could not be emptied.
    lost: Vec<DpaRange>,
}

/// What came of a request for memory.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Free of everything now, and not held any more.
    pub ranges: Vec<WindowRange>,
    /// Bytes of these that were online.
    pub emptied: u64,
    /// What stays, and why.
    pub refused: Vec<(WindowRange, RefusalReason)>,
}

impl NodeSurface {
    /// Over a window at `window`, of which nothing is held.
    pub fn new(blocks: MemoryBlocks, window: HpaWindow) -> Self {
        Self {
            blocks,
            window,
            held: Vec::new(),
            online: BTreeSet::new(),
            lost: Vec::new(),
        }
    }

    /// Bytes that are online.
    pub fn online(&self) -> u64 {
        self.online.len() as u64 * self.blocks.size()
    }

    /// Leases all there is from the broker, until the connection ends.
    pub fn serve(&mut self, client: &BrokerClient, welcome: &Welcome) -> ClientError {
        match self.converse(client, welcome) {
            Ok(never) => match never {},
            Err(error) => error,
        }
    }

    fn converse(
        &mut self,
        client: &BrokerClient,
        welcome: &Welcome,
    ) -> Result<std::convert::Infallible, ClientError> {
        client.request_lease(welcome.window_len)?;
        let mut settled = false;
        let mut next_try = Instant::now();
        loop {
            let wait = next_try.saturating_duration_since(Instant::now());
            let wait = (!self.lost.is_empty()).then_some(wait);
            match client.recv(wait)? {
                Some(FromBroker::Grant { ranges, last, .. }) => {
                    self.granted(ranges.as_slice());
                    // What is not held after the first answer has no business online.
                    if last && !std::mem::replace(&mut settled, true) {
                        self.tidy();
                    }
                    self.count(&welcome.page);
                }
                Some(FromBroker::CapacityAvailable) => {
                    client.request_lease(welcome.window_len)?;
                }
                // There is nothing to answer, and no deadline.
                Some(FromBroker::Recall {
                    ranges, lost: true, ..
                }) => {
                    self.lose(ranges.as_slice());
                    self.let_go(client, PATIENCE)?;
                    next_try = Instant::now() + AGAIN;
                    self.count(&welcome.page);
                }
                Some(FromBroker::Recall {
                    id,
                    bytes,
                    deadline,
                    ranges,
                    unused,
                    ..
                }) => {
                    let start = Instant::now();
                    let end = start.checked_add(deadline).unwrap_or(start);
                    let given = match unused {
                        // All that is online may be used, for all that is known here.
                        true => Given::default(),
                        false => self.give(ranges.as_slice(), bytes, end),
                    };
                    self.answer(client, id, &given, start.elapsed())?;
                    self.count(&welcome.page);
                }
                Some(FromBroker::DramShort) | None => {}
            }
            if !self.lost.is_empty() && next_try <= Instant::now() {
                self.let_go(client, PATIENCE_AGAIN)?;
                next_try = Instant::now() + AGAIN;
                self.count(&welcome.page);
            }
        }
    }

    /// Lets go of what is lost, as far as that goes within `patience`.
    fn let_go(&mut self, client: &BrokerClient, patience: Duration) -> Result<(), ClientError> {
        let given = self.give_lost(Instant::now() + patience);
        client.return_ranges(&given.ranges)
    }

    fn answer(
        &self,
        client: &BrokerClient,
        id: u64,
        given: &Given,
        took: Duration,
    ) -> Result<(), ClientError> {
        client.return_ranges(&given.ranges)?;
        for (range, reason) in &given.refused {
            client.refuse_recall(id, *reason, range.len, &[*range])?;
        }
        let bytes: u64 = given.ranges.iter().map(|range| range.len).sum();
        client.answer_recall(
            id,
            &RecallOutcome {
                idle: bytes - given.emptied,
                to_dram: given.emptied,
                moving_us: took.as_micros() as u64,
                ..RecallOutcome::default()
            },
        )
    }

    fn count(&self, page: &ClientPage) {
        let held = self.held.iter().map(|range| range.len).sum();
        page.extent_held_bytes.store(held, Ordering::Relaxed);
        page.extent_live_bytes
            .store(self.online(), Ordering::Relaxed);
    }

    /// `ranges` are leased from now on: blocks that are complete by it are put online.
    pub fn granted(&mut self, ranges: &[WindowRange]) {
        self.held.extend(ranges.iter().copied().map(stretch));
        DpaRange::coalesce(&mut self.held);
        for range in ranges {
            self.lost = stretch(*range).cut_from(&self.lost);
        }
        for block in self.blocks.within(self.window) {
            let range = self.range_of(block);
            if self.online.contains(&block) || !self.holds(&range) {
                continue;
            }
            // An earlier surface may have left it online.
            if !self.blocks.is_online(block)
                && let Err(error) = self.blocks.put_online(block)
            {
                tracing::warn!(block, %error, "capacity is not memory of the node");
                continue;
            }
            tracing::info!(block, "memory block online");
            self.online.insert(block);
        }
    }

    /// Takes offline what is not held: somebody has put it online.
    pub fn tidy(&self) {
        for block in self.blocks.within(self.window) {
            if self.online.contains(&block) || !self.blocks.is_online(block) {
                continue;
            }
            let deadline = Instant::now() + PATIENCE;
            match self.blocks.take_offline(block, deadline) {
                Ok(()) => tracing::warn!(block, "memory block was online without capacity"),
                Err(error) => tracing::error!(block, %error, "memory without capacity is in use"),
            }
        }
    }

    /// The device has taken `ranges`, whatever is there.
    pub fn lose(&mut self, ranges: &[WindowRange]) {
        self.lost.extend(ranges.iter().copied().map(stretch));
        DpaRange::coalesce(&mut self.lost);
    }

    /// Gives up what is lost; what stays is tried again the next time.
    pub fn give_lost(&mut self, deadline: Instant) -> Given {
        let wanted: Vec<WindowRange> = self.lost.drain(..).map(shrink).collect();
        let given = self.give(&wanted, 0, deadline);
        let stays = given.refused.iter().map(|(range, _)| *range);
        self.lost = stays.map(stretch).collect();
        given
    }

    /// Gives up `wanted`, or any `bytes` if it is empty: by whole blocks of what is online.
    pub fn give(&mut self, wanted: &[WindowRange], bytes: u64, deadline: Instant) -> Given {
        let wanted: Vec<DpaRange> = match wanted {
            [] => self.cheapest(bytes),
            ranges => ranges.iter().copied().map(stretch).collect(),
        };
        let mut given = Given::default();
        let mut free: Vec<DpaRange> = Vec::new();
        let mut touched: BTreeSet<u64> = BTreeSet::new();
        for range in &wanted {
            let held = self.held.iter().filter_map(|held| held.intersection(range));
            for part in held {
                // Offline parts are free as they are.
                let mut rest = vec![part];
                for &block in &self.online {
                    let whole = self.range_of(block);
                    if whole.intersects(&part) {
                        touched.insert(block);
                        rest = whole.cut_from(&rest);
                    }
                }
                free.extend(rest);
            }
        }
        for block in touched {
            let range = self.range_of(block);
            match self.blocks.take_offline(block, deadline) {
                Ok(()) => {
                    tracing::info!(block, "memory block offline");
                    self.online.remove(&block);
                    given.emptied += range.len;
                    free.push(range);
                }
                Err(error) => {
                    tracing::warn!(block, %error, "memory block stays");
                    let reason = match error {
                        BlockError::Late { .. } => RefusalReason::Deadline,
                        _ => RefusalReason::CannotMove,
                    };
                    let parts = wanted.iter().filter_map(|part| part.intersection(&range));
                    given
                        .refused
                        .extend(parts.map(|part| (shrink(part), reason)));
                }
            }
        }
        DpaRange::coalesce(&mut free);
        for range in &free {
            self.held = range.cut_from(&self.held);
        }
        given.ranges = free.into_iter().map(shrink).collect();
        given
    }

    /// `bytes` of what is held: first what is offline, then blocks from the highest address.
    fn cheapest(&self, bytes: u64) -> Vec<DpaRange> {
        let mut offline = self.held.clone();
        for &block in &self.online {
            offline = self.range_of(block).cut_from(&offline);
        }
        let online = self.online.iter().rev().map(|block| self.range_of(*block));
        let mut left = bytes;
        let mut chosen = Vec::new();
        for range in offline.into_iter().chain(online) {
            if left == 0 {
                break;
            }
            let len = range.len.min(left);
            left -= len;
            chosen.push(DpaRange { len, ..range });
        }
        chosen
    }

    fn holds(&self, range: &DpaRange) -> bool {
        self.held.iter().any(|held| held.contains(range))
    }

    /// Where `block`, which lies in the window, is in it.
    fn range_of(&self, block: u64) -> DpaRange {
        let Hpa(base) = self.window.base;
        DpaRange {
            start: Dpa(block * self.blocks.size() - base),
            len: self.blocks.size(),
        }
    }
}

/// A range of the window, to be counted with.
fn stretch(range: WindowRange) -> DpaRange {
    DpaRange {
        start: Dpa(range.offset),
        len: range.len,
    }
}

fn shrink(range: DpaRange) -> WindowRange {
    WindowRange {
        offset: range.start.0,
        len: range.len,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Sysfs;
    use std::fs;
    use std::path::PathBuf;

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 128 * MIB;
    /// The window's first block.
    const FIRST: u64 = 34;

    struct Rig {
        root: tempfile::TempDir,
        surface: NodeSurface,
    }

    impl Rig {
        /// Four blocks, all offline.
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let directory = root.path().join("devices/system/memory");
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("block_size_bytes"), "8000000\n").unwrap();
            let blocks = MemoryBlocks::of(&Sysfs::new(root.path())).unwrap();
            let window = HpaWindow {
                base: Hpa(FIRST * BLOCK),
                len: 4 * BLOCK,
            };
            let surface = NodeSurface::new(blocks, window);
            let rig = Self { root, surface };
            for block in 0..4 {
                fs::create_dir(rig.state(block).parent().unwrap()).unwrap();
                rig.set(block, "offline\n");
            }
            rig
        }

        fn state(&self, block: u64) -> PathBuf {
            let directory = self.root.path().join("devices/system/memory");
            directory.join(format!("memory{}/state", FIRST + block))
        }

        fn set(&self, block: u64, state: &str) {
            fs::write(self.state(block), state).unwrap();
        }

        /// Which blocks were told to go online and not to go offline.
        fn online(&self) -> Vec<u64> {
            let state = |block: &u64| fs::read_to_string(self.state(*block)).unwrap();
            let is_online = |block: &u64| state(block).starts_with("online");
            (0..4).filter(is_online).collect()
        }

        fn give(&mut self, wanted: &[WindowRange], bytes: u64) -> Given {
            let deadline = Instant::now() + Duration::from_secs(60);
            self.surface.give(wanted, bytes, deadline)
        }
    }

    fn range(start: u64, len: u64) -> WindowRange {
        WindowRange {
            offset: start * MIB,
            len: len * MIB,
        }
    }

    #[test]
    fn a_block_is_online_when_all_of_it_is_held() {
        let mut rig = Rig::new();
        rig.surface.granted(&[range(100, 100), range(256, 64)]);
        assert_eq!(rig.online(), [0; 0]);
        rig.surface.granted(&[range(200, 56)]);
        assert_eq!(rig.online(), [1]);
        rig.surface.granted(&[range(0, 100)]);
        assert_eq!(rig.online(), [0, 1]);
        assert_eq!(rig.surface.online(), 2 * BLOCK);
    }

    #[test]
    fn a_part_that_is_asked_for_takes_its_block_along() {
        let mut rig = Rig::new();
        rig.surface.granted(&[range(0, 256), range(256, 64)]);
        let given = rig.give(&[range(130, 2), range(300, 10)], 12 * MIB);
        assert_eq!(given.ranges, [range(128, 128), range(300, 10)]);
        assert_eq!((given.emptied, given.refused.len()), (BLOCK, 0));
        assert_eq!(rig.online(), [0]);
        // What was given is not held: it takes all of the block to have it online again.
        rig.surface.granted(&[range(128, 64)]);
        assert_eq!(rig.online(), [0]);
        rig.surface.granted(&[range(192, 64)]);
        assert_eq!(rig.online(), [0, 1]);
        assert_eq!(rig.give(&[range(320, 64)], 64 * MIB), Given::default());
    }

    #[test]
    fn what_is_offline_goes_first_and_then_the_highest_block() {
        let mut rig = Rig::new();
        rig.surface.granted(&[range(0, 256), range(400, 8)]);
        assert_eq!(rig.give(&[], 8 * MIB).ranges, [range(400, 8)]);
        let given = rig.give(&[], 2 * MIB);
        assert_eq!(
            (given.ranges, given.emptied),
            (vec![range(128, 128)], BLOCK)
        );
        assert_eq!(rig.online(), [0]);
    }

    #[test]
    fn a_block_that_cannot_be_emptied_stays_and_is_named() {
        let mut rig = Rig::new();
        rig.surface.granted(&[range(0, 256)]);
        fs::remove_file(rig.state(1)).unwrap();
        fs::create_dir(rig.state(1)).unwrap();
        let given = rig.give(&[range(0, 256)], 256 * MIB);
        assert_eq!(given.ranges, [range(0, 128)]);
        assert_eq!(
            given.refused,
            [(range(128, 128), RefusalReason::CannotMove)]
        );
        assert_eq!(rig.surface.online(), BLOCK);
    }

    #[test]
    fn what_is_lost_and_in_use_is_tried_until_it_is_free() {
        let mut rig = Rig::new();
        rig.surface.granted(&[range(0, 256)]);
        fs::remove_file(rig.state(1)).unwrap();
        fs::create_dir(rig.state(1)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        rig.surface.lose(&[range(64, 96)]);
        assert_eq!(rig.surface.give_lost(deadline).ranges, [range(0, 128)]);
        assert_eq!(rig.surface.give_lost(deadline).ranges, []);
        fs::remove_dir(rig.state(1)).unwrap();
        rig.set(1, "online\n");
        assert_eq!(rig.surface.give_lost(deadline).ranges, [range(128, 128)]);
        assert_eq!(rig.surface.give_lost(deadline), Given::default());
        assert_eq!(rig.surface.online(), 0);
    }

    #[test]
    fn what_an_earlier_surface_left_is_taken_over_and_the_rest_taken_offline() {
        let mut rig = Rig::new();
        rig.set(0, "online\n");
        rig.set(2, "online\n");
        rig.surface.granted(&[range(0, 128)]);
        assert_eq!(fs::read_to_string(rig.state(0)).unwrap(), "online\n");
        rig.surface.tidy();
        assert_eq!(rig.online(), [0]);
        assert_eq!(rig.surface.online(), BLOCK);
    }
}
