//! Capacity that is shared with other hosts: mapped read-only by who opens its tag.
//!
//! A *reader* is one opened tag of one process. It holds no lease; the shared
//! extents stay where they are, are never wiped and leased to nobody. As long as
//! a reader maps its page, the tag is in use, and a release of it is refused by
//! name. What the device takes all the same is said in the page, and held back
//! until the readers have let go.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::time::Instant;

use uuid::Uuid;

use super::connection::{ConnectionId, Phase};
use super::lease::{ExtentSlots, LeaseTable, Slot, range_of};
use super::liveness::{Liveness, Probe};
use super::peer::{Peer, is_gone};
use super::protocol::{GRANULE, Kind, MAX_RANGES, Message, SHARED_LAST, SharedCode, WindowRange};
use super::refusal::SharedPart;
use super::server::Broker;
use super::status::SharedTag;
use crate::address::DpaRange;
use crate::extent::{Extent, ExtentTag};

/// The broker's number for a reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ReaderId(u32);

/// What the keeper calls the pages of readers: this, then number, pid, uid and tag.
const PAGES: &str = "reader-";

/// A process that maps a shared tag.
#[derive(Debug)]
pub(super) struct Reader {
    tag: ExtentTag,
    pid: u32,
    uid: u32,
    liveness: Liveness,
    connection: Option<ConnectionId>,
    probe: Option<Probe>,
    /// The device has taken what it maps.
    lost: bool,
}

impl Reader {
    fn page_name(&self, id: ReaderId) -> String {
        let tag = Uuid::from_bytes(self.tag.0).simple();
        format!("{PAGES}{}-{}-{}-{tag}", id.0, self.pid, self.uid)
    }

    /// The one whose page has this name, without [`PAGES`].
    fn named(name: &str) -> Option<(ReaderId, u32, u32, ExtentTag)> {
        let mut fields = name.split('-');
        let id = ReaderId(fields.next()?.parse().ok()?);
        let (pid, uid) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        let tag = ExtentTag::from(Uuid::try_parse(fields.next()?).ok()?);
        Some((id, pid, uid, tag))
    }
}

/// All readers.
#[derive(Debug, Default)]
pub(super) struct Readers {
    by_id: BTreeMap<ReaderId, Reader>,
    last: u32,
}

impl Readers {
    /// A number that none of them has.
    fn new_number(&mut self) -> ReaderId {
        loop {
            self.last = self.last.wrapping_add(1);
            let number = ReaderId(self.last);
            if !self.by_id.contains_key(&number) {
                return number;
            }
        }
    }

    /// When one of them is to be looked after.
    pub(super) fn due(&self) -> Option<Instant> {
        let probes = self.by_id.values().filter_map(|r| r.probe.as_ref());
        probes.map(Probe::due).min()
    }

    /// A process that maps `tag`.
    pub(super) fn pid_of(&self, tag: ExtentTag) -> Option<u32> {
        let of = |reader: &&Reader| reader.tag == tag && !reader.lost;
        self.by_id.values().find(of).map(|reader| reader.pid)
    }

    /// How many map each tag that is there.
    fn mapped(&self) -> BTreeMap<ExtentTag, usize> {
        let mut mapped = BTreeMap::new();
        for reader in self.by_id.values().filter(|reader| !reader.lost) {
            *mapped.entry(reader.tag).or_default() += 1;
        }
        mapped
    }
}

impl LeaseTable {
    /// The extents of a shared tag, in the order of their sequence numbers.
    fn shared_extents(&self, tag: ExtentTag) -> Result<Vec<WindowRange>, SharedCode> {
        let of_tag = self.extents.iter().filter(|e| e.extent.tag == tag);
        let mut extents: Vec<&ExtentSlots> = of_tag.collect();
        if extents.is_empty() || tag.is_null() {
            return Err(SharedCode::NoTag);
        }
        if !extents.iter().all(|extent| extent.shared) {
            return Err(SharedCode::NotShared);
        }
        extents.sort_by_key(|extent| extent.extent.shared_seq);
        let mut ranges = Vec::with_capacity(extents.len());
        for extent in extents {
            let whole = range_of(extent.first, extent.count);
            if self.dpa(whole) != extent.extent.range {
                return Err(SharedCode::Misaligned);
            }
            if extent.slots().any(|index| self.outgoing[index]) {
                return Err(SharedCode::AskedBack);
            }
            ranges.push(whole);
        }
        Ok(ranges)
    }

    /// Whether `range` is shared capacity.
    pub(super) fn is_shared(&self, range: WindowRange) -> bool {
        let slot = self.slots.get((range.offset / GRANULE) as usize);
        slot == Some(&Slot::Shared)
    }

    /// The tag, if it is mapped, of the extent that slot `index` was of.
    pub(super) fn mapped_there(&self, before: &[ExtentSlots], index: usize) -> Option<ExtentTag> {
        let was = before.iter().find(|extent| extent.slots().contains(&index));
        match was {
            Some(was) => Some(was.extent.tag).filter(|tag| self.mapped.contains_key(tag)),
            // An earlier broker's: there is no telling whose it was.
            None => self.mapped.keys().next().copied(),
        }
    }

    /// Shared capacity inside `range`, by extent.
    pub(super) fn shared_in(&self, range: &DpaRange) -> Vec<(DpaRange, ExtentTag)> {
        let shared = self.extents.iter().filter(|extent| extent.shared);
        let part = |e: &ExtentSlots| Some((e.extent.range.intersection(range)?, e.extent.tag));
        shared.filter_map(part).collect()
    }

    /// What was lost under readers that are all gone may be used again.
    fn forget_shared_lost(&mut self) {
        for index in 0..self.slots.len() {
            if self.slots[index] == Slot::SharedLost {
                self.set(index, Slot::Absent);
            }
        }
    }
}

impl Broker {
    /// Takes over the readers that an earlier broker had.
    pub(super) fn adopt_readers(&mut self, now: Instant) {
        for (name, page) in self.store.take_all(PAGES) {
            let Some((id, pid, uid, tag)) = Reader::named(&name) else {
                continue;
            };
            let liveness = Liveness::adopt(page);
            let reader = Reader {
                tag,
                pid,
                uid,
                lost: liveness.is_lost(),
                liveness,
                connection: None,
                probe: Some(Probe::start(now)),
            };
            self.readers.last = self.readers.last.max(id.0);
            self.readers.by_id.insert(id, reader);
        }
        self.table.mapped = self.readers.mapped();
    }

    /// A process wants to map a tag.
    pub(super) fn open_shared(&mut self, id: ConnectionId, message: &Message) {
        let tag = message.tag();
        match self.share(id, tag) {
            Ok(reader) => tracing::info!(reader = reader.0, %tag, "shared capacity mapped"),
            Err(code) => {
                tracing::info!(%tag, reason = ?code, "shared capacity refused");
                let message = Message::new(Kind::SharedRefused).with_arg(0, code as u64);
                self.post(Some(id), message);
            }
        }
    }

    fn share(&mut self, connection: ConnectionId, tag: ExtentTag) -> Result<ReaderId, SharedCode> {
        let ranges = self.table.shared_extents(tag)?;
        let liveness = Liveness::new().map_err(|_| SharedCode::Full)?;
        let to = self.connections.get_mut(&connection);
        let to = to.ok_or(SharedCode::Full)?;
        let Peer { pid, uid, .. } = to.peer;
        let id = self.readers.new_number();
        let reader = Reader {
            tag,
            pid,
            uid,
            liveness,
            connection: Some(connection),
            probe: None,
            lost: false,
        };
        // All that a broker after this one needs, before anything is mapped.
        let page = reader.liveness.page();
        self.store.keep(&reader.page_name(id), page);
        let bytes = ranges.iter().map(|range| range.len).sum();
        let chunks = ranges.chunks(MAX_RANGES);
        let last = chunks.len() - 1;
        for (index, chunk) in chunks.enumerate() {
            let message = Message::new(Kind::Shared)
                .with_arg(0, bytes)
                .with_arg(3, self.window.base())
                .with_flags(if index == last { SHARED_LAST } else { 0 })
                .with_ranges(chunk);
            let sent = match index {
                0 => to.send_fds(&message, &[self.window.fd(), page]),
                _ => to.send(message),
            };
            if sent.is_err() {
                self.store.forget(&reader.page_name(id));
                return Err(SharedCode::Full);
            }
        }
        to.phase = Phase::Reader(id);
        self.readers.by_id.insert(id, reader);
        self.table.mapped = self.readers.mapped();
        Ok(id)
    }

    /// The connection of a reader is closed: from now on only its page tells
    /// whether it maps anything.
    pub(super) fn reader_closed(&mut self, id: ReaderId, now: Instant) {
        if let Some(reader) = self.readers.by_id.get_mut(&id) {
            reader.connection = None;
            reader.probe.get_or_insert(Probe::start(now));
        }
    }

    /// Ends readers that map nothing any more: those that are due, or `all`.
    pub(super) fn probe_readers(&mut self, now: Instant, all: bool) {
        let mut ended = Vec::new();
        for (id, reader) in &mut self.readers.by_id {
            let due = |probe: &&mut Probe| all || probe.due() <= now;
            if let Some(probe) = reader.probe.as_mut().filter(due) {
                if reader.liveness.look().ended(|| is_gone(reader.pid)) {
                    ended.push(*id);
                } else {
                    probe.again(now);
                }
            }
        }
        if ended.is_empty() {
            return;
        }
        for id in ended {
            if let Some(reader) = self.readers.by_id.remove(&id) {
                tracing::info!(reader = id.0, pid = reader.pid, tag = %reader.tag, "shared capacity let go");
                self.store.forget(&reader.page_name(id));
            }
        }
        self.table.mapped = self.readers.mapped();
        if !self.readers.by_id.values().any(|reader| reader.lost) {
            self.table.forget_shared_lost();
            self.sync_capacity();
        }
        // What the device wants of it can go now.
        self.hand_over_returned();
    }

    /// The device has taken shared memory: whoever maps it is told in its page.
    pub(super) fn shared_taken(&mut self, lost: &[(ExtentTag, WindowRange)]) -> Vec<SharedPart> {
        let mut parts = Vec::new();
        for (tag, range) in lost {
            let pid = self.readers.pid_of(*tag);
            parts.push((*range, pid));
        }
        for (tag, _) in lost {
            for reader in self.readers.by_id.values_mut().filter(|r| r.tag == *tag) {
                tracing::error!(pid = reader.pid, %tag, "shared capacity is gone under its reader");
                reader.liveness.say_lost();
                reader.lost = true;
            }
        }
        self.table.mapped = self.readers.mapped();
        parts
    }

    /// The shared tags that are here, and those that are gone and still mapped.
    pub(super) fn shared_tags(&self) -> Vec<SharedTag> {
        let mut tags: BTreeMap<(ExtentTag, bool), SharedTag> = BTreeMap::new();
        let new = |tag: ExtentTag, lost| SharedTag {
            tag: Uuid::from_bytes(tag.0),
            bytes: 0,
            extents: 0,
            lost,
            pids: Vec::new(),
        };
        for slots in self.table.extents.iter().filter(|extent| extent.shared) {
            let Extent { range, tag, .. } = slots.extent;
            let known = tags.entry((tag, false)).or_insert_with(|| new(tag, false));
            known.bytes += range.len;
            known.extents += 1;
        }
        for reader in self.readers.by_id.values() {
            let key = (reader.tag, reader.lost);
            let known = tags.entry(key).or_insert_with(|| new(key.0, key.1));
            known.pids.push(reader.pid);
        }
        tags.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_page_says_whose_it_is() {
        let reader = Reader {
            tag: ExtentTag([7; 16]),
            pid: 41,
            uid: 1000,
            liveness: Liveness::new().unwrap(),
            connection: None,
            probe: None,
            lost: false,
        };
        let name = reader.page_name(ReaderId(3));
        let named = name.strip_prefix(PAGES).and_then(Reader::named);
        assert_eq!(named, Some((ReaderId(3), 41, 1000, ExtentTag([7; 16]))));
        assert_eq!(Reader::named("3-41-1000"), None);
        assert_eq!(Reader::named(""), None);
    }
}
