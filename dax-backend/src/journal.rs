//! What must survive the driver's death: groups read from the device's log and not answered yet.
//!
//! A group larger than one read of the log can only be collected by clearing records before the
//! group is complete, and a cleared record exists nowhere else: no command lists what is offered.
//! So the driver writes down what it has staged *before* it clears, and what it is going to
//! answer *before* it answers. After a crash at any point in between, a new driver finds either
//! the record in the log or the extent in the journal, and for an answer that may or may not have
//! been given it looks at the device's extent list.

#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};
use serde::{Deserialize, Serialize};

use crate::event_record::RawRecord;
use crate::extent::Extent;
use crate::staging::{OfferedGroup, RejectReason};

/// Where the driver keeps [`JournalEntry`]s. Only the latest one counts.
pub trait Journal: Send {
    /// Replaces what is kept, all or nothing.
    ///
    /// # Errors
    /// The system's; the driver then clears and answers nothing.
    fn save(&mut self, entry: &JournalEntry) -> io::Result<()>;

    /// What was saved last, if anything.
    ///
    /// # Errors
    /// The system's, or [`io::ErrorKind::InvalidData`].
    fn load(&mut self) -> io::Result<Option<JournalEntry>>;
}

/// Everything that the driver knows and the device does not tell twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JournalEntry {
    /// Records of the last read, which may still be in the log.
    pub last_read: Vec<RecordId>,
    /// How many records lost before the last read are accounted for.
    pub overflow_counted: u32,
    /// Where records are missing.
    pub cuts: VecDeque<Cut>,
    /// The open group.
    pub open: Vec<Extent>,
    /// Whether records are dropped until their chain ends.
    pub discarding: bool,
    /// What is to be done, in the order of the records.
    pub work: VecDeque<Work>,
    /// The answer to the group at the front of `work`, if it may have been given.
    pub answer: Option<Answer>,
    /// How many groups at most the device may have offered that were never seen.
    pub unseen_groups: u32,
    /// Whether the group answered last was cut short by lost records.
    pub after_truncated: bool,
}

/// Tells one record from another. Handles alone come around.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordId {
    handle: u16,
    timestamp: u64,
    start: u64,
    len: u64,
}

impl From<&RawRecord> for RecordId {
    fn from(record: &RawRecord) -> Self {
        Self {
            handle: record.handle.get(),
            timestamp: record.timestamp.get(),
            start: record.start.get(),
            len: record.extent_len.get(),
        }
    }
}

/// A place in the sequence of records where some were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cut {
    /// So many records come before it.
    pub after: u32,
    /// So many were lost.
    pub lost: u32,
}

/// Something that a record asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    /// Answer a group.
    Answer(OfferedGroup),
    /// Tell whoever uses it that an extent is wanted back.
    Release(Extent),
    /// An extent is gone.
    ForcedRelease(Extent),
    /// Read the regions again.
    RegionUpdated(u8),
    /// Expect so many groups at most, offered here in the order, that no record tells of.
    GroupsUnseen(u32),
    /// Tell that records were lost.
    Overflow {
        /// How many.
        lost: u32,
    },
}

/// An answer, decided and perhaps given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What is accepted, cut to the accepted part, in the order of the events.
    pub accepted: Vec<Extent>,
    /// What is not.
    pub rejected: Vec<(Extent, RejectReason)>,
    /// How many groups before it were rejected unseen because the device did not take it.
    pub older_rejected: u32,
}

/// Keeps the entry in memory: for a device that does not outlive its driver.
#[derive(Clone, Debug, Default)]
pub struct MemoryJournal(Option<JournalEntry>);

impl Journal for MemoryJournal {
    fn save(&mut self, entry: &JournalEntry) -> io::Result<()> {
        self.0 = Some(entry.clone());
        Ok(())
    }

    fn load(&mut self) -> io::Result<Option<JournalEntry>> {
        Ok(self.0.clone())
    }
}

/// Keeps the entry in a file, replaced atomically and synced before `save` returns.
#[derive(Clone, Debug)]
pub struct FileJournal {
    path: PathBuf,
}

impl FileJournal {
    /// In the file at `path`, which need not exist; its directory must.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }
}

impl Journal for FileJournal {
    fn save(&mut self, entry: &JournalEntry) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = fs::File::create(&new)?;
        file.write_all(&serde_json::to_vec(entry)?)?;
        file.sync_data()?;
        fs::rename(&new, &self.path)
    }

    fn load(&mut self) -> io::Result<Option<JournalEntry>> {
        match fs::read(&self.path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Keeps the entry in a memfd, for as long as somebody holds a descriptor of it. Two places in
/// turn, each with a header that is written last: a driver killed while it writes leaves the
/// entry before.
#[derive(Debug)]
pub struct MemfdJournal {
    file: OwnedFd,
    saves: u64,
}

/// Bytes from one place to the other.
const PLACE: u64 = 64 << 20;
/// Header of a place: the number of the save, and the bytes of the entry after it.
const HEADER: u64 = 16;

impl MemfdJournal {
    /// A new file without an entry.
    ///
    /// # Errors
    /// The system's.
    pub fn new() -> io::Result<Self> {
        let file = memfd_create("dcmalloc-journal", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, 2 * PLACE)?;
        Ok(Self { file, saves: 0 })
    }

    /// In the file that an earlier one had.
    ///
    /// # Errors
    /// The system's.
    pub fn open(file: OwnedFd) -> io::Result<Self> {
        let mut journal = Self { file, saves: 0 };
        journal.saves = journal.header(0)?.0.max(journal.header(1)?.0);
        Ok(journal)
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn header(&self, place: u64) -> io::Result<(u64, u64)> {
        let mut header = [0; HEADER as usize];
        pread(&self.file, &mut header, place * PLACE)?;
        let (save, len) = header.split_at(8);
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        Ok((word(save), word(len)))
    }
}

impl Journal for MemfdJournal {
    fn save(&mut self, entry: &JournalEntry) -> io::Result<()> {
        let bytes = serde_json::to_vec(entry)?;
        if bytes.len() as u64 > PLACE - HEADER {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let save = self.saves + 1;
        let place = save % 2 * PLACE;
        pwrite(&self.file, &bytes, place + HEADER)?;
        let header = [save.to_le_bytes(), (bytes.len() as u64).to_le_bytes()].concat();
        pwrite(&self.file, &header, place)?;
        self.saves = save;
        Ok(())
    }

    fn load(&mut self) -> io::Result<Option<JournalEntry>> {
        if self.saves == 0 {
            return Ok(None);
        }
        let place = self.saves % 2;
        let mut bytes = vec![0; self.header(place)?.1.min(PLACE) as usize];
        pread(&self.file, &mut bytes, place * PLACE + HEADER)?;
        Ok(Some(serde_json::from_slice(&bytes)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::{Dpa, DpaRange};
    use crate::staging::Closed;

    #[test]
    fn a_file_journal_gives_back_what_was_saved_last() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        let mut journal = FileJournal::new(path.clone());
        assert!(journal.load().unwrap().is_none());
        let extent = Extent::untagged(DpaRange {
            start: Dpa(u64::MAX),
            len: u64::MAX,
        });
        let group = OfferedGroup {
            extents: vec![extent],
            closed: Closed::Truncated,
        };
        let entry = JournalEntry {
            open: vec![extent],
            work: [Work::Answer(group), Work::Overflow { lost: 3 }].into(),
            answer: Some(Answer {
                accepted: Vec::new(),
                rejected: vec![(extent, RejectReason::Misaligned { block_size: 64 })],
                older_rejected: 1,
            }),
            unseen_groups: 2,
            ..JournalEntry::default()
        };
        journal.save(&JournalEntry::default()).unwrap();
        journal.save(&entry).unwrap();
        assert_eq!(FileJournal::new(path.clone()).load().unwrap(), Some(entry));
        fs::write(&path, b"{").unwrap();
        assert!(journal.load().is_err());
    }

    #[test]
    fn a_memfd_journal_keeps_the_entry_before_until_the_next_is_whole() {
        let mut journal = MemfdJournal::new().unwrap();
        assert_eq!(journal.load().unwrap(), None);
        let entry = |unseen_groups| JournalEntry {
            unseen_groups,
            ..JournalEntry::default()
        };
        journal.save(&entry(1)).unwrap();
        journal.save(&entry(2)).unwrap();
        let file = journal.fd().try_clone_to_owned().unwrap();
        let mut next = MemfdJournal::open(file.try_clone().unwrap()).unwrap();
        assert_eq!(next.load().unwrap(), Some(entry(2)));
        // Killed in the middle of the third.
        pwrite(&file, b"{half", PLACE + HEADER).unwrap();
        let mut next = MemfdJournal::open(file).unwrap();
        assert_eq!(next.load().unwrap(), Some(entry(2)));
        next.save(&entry(3)).unwrap();
        assert_eq!(next.load().unwrap(), Some(entry(3)));
    }
}
