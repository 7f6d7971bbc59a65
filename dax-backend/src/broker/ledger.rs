//! The broker's memory of who holds what, in a memfd that outlives the broker.
//!
//! Words of 8 bytes, each written with one store: a broker that is killed at
//! any instruction leaves either the old word or the new one. A slot is written
//! before its grant is sent and after its return is received, so what the
//! ledger calls free nobody holds. A client's record counts from the moment its
//! first word is written, which is the last.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions};
use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use uuid::Uuid;
use zerocopy::FromBytes;

use super::lease::{ClientId, Slot};
use super::peer::Peer;

/// First word of a ledger: its layout's version is the last byte.
const MAGIC: u64 = u64::from_le_bytes(*b"dcmledg\x01");
/// Words before the slots: magic, slots, the first DPA, the next client's number.
const HEADER: usize = 4;
/// Clients that have a place. Pages of places that were never used take no memory.
const CLIENTS: usize = 1 << 14;
/// Words of a client's record: number, pid and uid, gid, run, name, key.
const RECORD: usize = 9;

const OUTGOING: u64 = 1 << 55;
const HUGE: u64 = 1 << 54;

/// What a broker has to know of a client to take it over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ClientRecord {
    pub(super) id: ClientId,
    pub(super) peer: Peer,
    pub(super) run: Option<Uuid>,
    /// At most 16 bytes are kept, as many as the kernel has of it.
    pub(super) command: String,
    /// What the client proves itself with.
    pub(super) key: u128,
}

/// What the ledger says of one granule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SlotEntry {
    pub(super) slot: Slot,
    /// The device has asked for it.
    pub(super) outgoing: bool,
    /// It is one huge page.
    pub(super) huge: bool,
}

/// The ledger, mapped.
#[derive(Debug)]
pub(super) struct Ledger {
    file: OwnedFd,
    map: MmapMut,
    slots: usize,
}

impl Ledger {
    /// An empty one for `slots` granules from the DPA `base` on.
    pub(super) fn new(slots: usize, base: u64) -> Result<Self, Errno> {
        let file = memfd_create("dcmalloc-ledger", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, Self::len(slots))?;
        let mut ledger = Self::map(file, slots)?;
        for (index, word) in [(1, slots as u64), (2, base), (3, 1), (0, MAGIC)] {
            ledger.store(index, word);
        }
        Ok(ledger)
    }

    /// The one that an earlier broker kept in `file`; `None` if that is of
    /// another window, or nothing of ours.
    pub(super) fn open(file: OwnedFd, slots: usize, base: u64) -> Option<Self> {
        let len = fstat(&file).ok()?.st_size as u64;
        if len != Self::len(slots) {
            return None;
        }
        let mut ledger = Self::map(file, slots).ok()?;
        let header = [0, 1, 2].map(|index| ledger.load(index));
        (header == [MAGIC, slots as u64, base]).then_some(ledger)
    }

    fn len(slots: usize) -> u64 {
        ((HEADER + slots + CLIENTS * RECORD) * 8) as u64
    }

    fn map(file: OwnedFd, slots: usize) -> Result<Self, Errno> {
        // SAFETY: a memfd of the broker's own that nobody shrinks, and whose
        // bytes are only read as atomics.
        let map = unsafe { MmapOptions::new().no_reserve_swap().map_mut(&file) }
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::NOMEM))?;
        Ok(Self { file, map, slots })
    }

    /// The file, to be kept by somebody else.
    pub(super) fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn words(&mut self) -> &mut [AtomicU64] {
        <[AtomicU64]>::mut_from_bytes(&mut self.map)
            .expect("a mapping is aligned, its size a multiple of 8")
    }

    fn load(&mut self, index: usize) -> u64 {
        self.words()[index].load(Ordering::Acquire)
    }

    fn store(&mut self, index: usize, word: u64) {
        self.words()[index].store(word, Ordering::Release);
    }

    /// What it says of granule `index`.
    pub(super) fn slot(&mut self, index: usize) -> SlotEntry {
        let word = self.load(HEADER + index);
        let client = ClientId(word as u32);
        let slot = match word >> 56 {
            1 => Slot::Dirty,
            2 => Slot::Clean,
            3 => Slot::Warm,
            4 => Slot::Leased(client),
            5 => Slot::Lost(client),
            6 => Slot::Broken,
            7 => Slot::Shared,
            8 => Slot::SharedLost,
            _ => Slot::Absent,
        };
        SlotEntry {
            slot,
            outgoing: word & OUTGOING != 0,
            huge: word & HUGE != 0,
        }
    }

    /// Notes what has become of granule `index`.
    pub(super) fn set_slot(&mut self, index: usize, entry: SlotEntry) {
        let (state, client) = match entry.slot {
            Slot::Absent => (0, 0),
            // What became of it the device's list says.
            Slot::Dirty | Slot::Leaving => (1, 0),
            Slot::Clean => (2, 0),
            Slot::Warm => (3, 0),
            Slot::Leased(client) => (4, client.0),
            Slot::Lost(client) => (5, client.0),
            Slot::Broken => (6, 0),
            Slot::Shared => (7, 0),
            Slot::SharedLost => (8, 0),
        };
        let mut word = state << 56 | u64::from(client);
        word |= if entry.outgoing { OUTGOING } else { 0 };
        word |= if entry.huge { HUGE } else { 0 };
        self.store(HEADER + index, word);
    }

    /// The next number. After the last one comes the first again, which
    /// somebody may still have.
    pub(super) fn next_client(&mut self) -> ClientId {
        let next = u32::try_from(self.load(3)).map(ClientId);
        let next = next.ok().filter(|id| id.0 != 0 && !id.is_family());
        let next = next.unwrap_or(ClientId(1));
        self.store(3, u64::from(next.0) + 1);
        next
    }

    /// Whether a client has this number.
    pub(super) fn has_client(&mut self, id: ClientId) -> bool {
        self.place(Some(id)).is_some()
    }

    /// Notes a client. `false`: there is no place left.
    pub(super) fn add_client(&mut self, record: &ClientRecord) -> bool {
        let Some(at) = self.place(None) else {
            return false;
        };
        let mut name = [0; 16];
        let len = record.command.len().min(name.len());
        name[..len].copy_from_slice(&record.command.as_bytes()[..len]);
        let name = u128::from_le_bytes(name);
        let run = record.run.map_or(0, |run| run.as_u128());
        let peer = record.peer;
        let words = [
            u64::from(peer.pid) << 32 | u64::from(peer.uid),
            u64::from(peer.gid),
            (run >> 64) as u64,
            run as u64,
            (name >> 64) as u64,
            name as u64,
            (record.key >> 64) as u64,
            record.key as u64,
        ];
        for (index, word) in words.into_iter().enumerate() {
            self.store(at + 1 + index, word);
        }
        self.store(at, u64::from(record.id.0));
        true
    }

    /// Strikes a client out.
    pub(super) fn remove_client(&mut self, id: ClientId) {
        if let Some(at) = self.place(Some(id)) {
            self.store(at, 0);
        }
    }

    /// Where the record of `id` is; `None`: a free place.
    fn place(&mut self, id: Option<ClientId>) -> Option<usize> {
        let wanted = id.map_or(0, |id| u64::from(id.0));
        let first = HEADER + self.slots;
        (0..CLIENTS)
            .map(|index| first + index * RECORD)
            .find(|at| self.load(*at) == wanted)
    }

    /// All clients.
    pub(super) fn clients(&mut self) -> Vec<ClientRecord> {
        let first = HEADER + self.slots;
        let mut clients = Vec::new();
        for at in (0..CLIENTS).map(|index| first + index * RECORD) {
            let id = self.load(at);
            if id == 0 {
                continue;
            }
            let word: [u64; 8] = std::array::from_fn(|index| self.load(at + 1 + index));
            let wide = |index: usize| u128::from(word[index]) << 64 | u128::from(word[index + 1]);
            let name = wide(4).to_le_bytes();
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            clients.push(ClientRecord {
                id: ClientId(id as u32),
                peer: Peer {
                    pid: (word[0] >> 32) as u32,
                    uid: word[0] as u32,
                    gid: word[1] as u32,
                },
                run: (wide(2) != 0).then(|| Uuid::from_u128(wide(2))),
                command: String::from_utf8_lossy(name).into_owned(),
                key: wide(6),
            });
        }
        clients
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: u32) -> ClientRecord {
        ClientRecord {
            id: ClientId(id),
            peer: Peer {
                pid: 77,
                uid: 1000,
                gid: 100,
            },
            run: Some(Uuid::from_u128(0x1234 << 70 | 5)),
            command: "valkey-server".into(),
            key: 7 << 64 | 9,
        }
    }

    #[test]
    fn what_was_written_is_read_by_the_next_broker() {
        let mut ledger = Ledger::new(9, 0x1000).unwrap();
        let entries = [
            (Slot::Dirty, false, true),
            (Slot::Clean, false, false),
            (Slot::Warm, false, true),
            (Slot::Leased(ClientId(u32::MAX)), true, false),
            (Slot::Lost(ClientId(3)), false, false),
            (Slot::Broken, true, false),
            (Slot::Shared, true, false),
            (Slot::SharedLost, false, false),
            (Slot::Absent, false, false),
        ];
        for (index, (slot, outgoing, huge)) in entries.into_iter().enumerate() {
            let entry = SlotEntry {
                slot,
                outgoing,
                huge,
            };
            ledger.set_slot(index, entry);
        }
        assert_eq!(ledger.next_client(), ClientId(1));
        assert!(ledger.add_client(&record(1)));
        assert!(ledger.add_client(&record(2)));
        ledger.remove_client(ClientId(1));
        let file = ledger.fd().try_clone_to_owned().unwrap();
        drop(ledger);

        let mut again = Ledger::open(file, 9, 0x1000).unwrap();
        for (index, (slot, outgoing, huge)) in entries.into_iter().enumerate() {
            let entry = SlotEntry {
                slot,
                outgoing,
                huge,
            };
            assert_eq!(again.slot(index), entry);
        }
        assert_eq!(again.clients(), [record(2)]);
        assert_eq!(again.next_client(), ClientId(2));
        assert!(again.has_client(ClientId(2)) && !again.has_client(ClientId(1)));
        assert!(again.add_client(&record(3)));
        assert_eq!(again.clients(), [record(3), record(2)]);
    }

    #[test]
    fn the_ledger_of_another_window_is_not_ours() {
        let file = |ledger: &Ledger| ledger.fd().try_clone_to_owned().unwrap();
        let ledger = Ledger::new(8, 0x1000).unwrap();
        assert!(Ledger::open(file(&ledger), 8, 0x2000).is_none());
        assert!(Ledger::open(file(&ledger), 9, 0x1000).is_none());
        let empty = memfd_create("empty", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&empty, Ledger::len(8)).unwrap();
        assert!(Ledger::open(empty, 8, 0).is_none());
    }
}
