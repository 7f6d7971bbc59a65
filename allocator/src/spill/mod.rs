//! The file that granules go to which can go nowhere else.
//!
//! It has no name, so that it ends with the process, whatever ends that.
//! Granule `i` of the space has bytes `i * 2 MiB` and following, of which only
//! pages that are live are ever written. Each page has a checksum, in DRAM: a
//! page that comes back different is never shown to the program.

mod ring;

use core::ffi::CStr;
use core::ops::Range;
use core::ptr::null_mut;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::fs::{fallocate, open, unlink};
use rustix::io::{Errno, pread, pwrite};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::space::rebind::LivePages;
use crate::space::{GRANULE, PAGE, PAGES_PER_GRANULE};
use ring::Ring;

/// Whether granules can be spilled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u32)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum SpillState {
    /// `spill_dir` is not set, or nothing can be moved at all.
    #[default]
    Off = 0,
    /// No file can be made in `spill_dir`.
    Unusable = 1,
    /// Yes, with one write at a time: io_uring is denied.
    NoRing = 2,
    /// Yes.
    Ring = 3,
}

/// Why a granule did not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReadError {
    /// The file can't be read.
    #[error("its file cannot be read ({0})")]
    File(Errno),
    /// What was read is not what was written.
    #[error("its file holds something else than was written")]
    Changed,
}

/// Bytes to be written: where they are, and where they go.
#[derive(Clone, Copy, Debug)]
struct Piece {
    from: *const u8,
    len: usize,
    offset: u64,
}

/// The file, and what is known of it.
pub(crate) struct Spill {
    file: OwnedFd,
    /// Several writes at a time; `None` where io_uring is denied.
    ring: Option<Ring>,
    /// A checksum for each page of each granule of the space.
    sums: *mut u32,
    granules: usize,
}

impl Spill {
    /// Makes a file in `dir` for a space of `granules`.
    pub(crate) fn open(dir: &CStr, granules: usize) -> Result<Self, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let len = granules * PAGES_PER_GRANULE * size_of::<u32>();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let sums = unsafe { mmap_anonymous(null_mut(), len, access, flags) }?.cast();
        Ok(Self {
            file: unnamed(dir)?,
            ring: Ring::new().ok(),
            sums,
            granules,
        })
    }

    /// Whether several writes are under way at a time.
    pub(crate) fn has_ring(&self) -> bool {
        self.ring.is_some()
    }

    /// Writes what is live of granules: their index, where the content is, and
    /// which pages. When this fails, what was written of them is dropped.
    ///
    /// # Safety
    /// The live pages are readable, and nobody writes to them.
    pub(crate) unsafe fn write<'a>(
        &mut self,
        granules: impl Iterator<Item = (usize, *const u8, &'a LivePages)> + Clone,
    ) -> Result<(), Errno> {
        let sums = self.sums;
        let pieces = || {
            granules.clone().flat_map(|(index, from, live)| {
                live.runs().map(move |pages| {
                    for page in pages.clone() {
                        // SAFETY: a live page, and a sum of this space's.
                        unsafe {
                            *sum_at(sums, index, page) = sum(from.add(page * PAGE), index, page)
                        };
                    }
                    Piece {
                        // SAFETY: within the granule.
                        from: unsafe { from.add(pages.start * PAGE) },
                        len: pages.len() * PAGE,
                        offset: (index * GRANULE + pages.start * PAGE) as u64,
                    }
                })
            })
        };
        let mut written = match &mut self.ring {
            // SAFETY: the caller's.
            Some(ring) => unsafe { ring.write(self.file.as_fd(), pieces()) },
            None => Err(Errno::NOSYS),
        };
        if written == Err(Errno::NOSYS) {
            // Not there, or denied from now on.
            self.ring = None;
            // SAFETY: the caller's.
            written = pieces().try_for_each(|piece| unsafe { write_all(&self.file, piece) });
        }
        if written.is_err() {
            for (index, ..) in granules {
                self.drop_pages(index, 0..PAGES_PER_GRANULE);
            }
        }
        written
    }

    /// Reads live pages of granule `index` back.
    ///
    /// # Safety
    /// `into` is a granule of memory that nobody else uses.
    pub(crate) unsafe fn read(
        &self,
        index: usize,
        into: *mut u8,
        live: &LivePages,
    ) -> Result<(), ReadError> {
        for pages in live.runs() {
            let (mut at, end) = (pages.start * PAGE, pages.end * PAGE);
            while at < end {
                // SAFETY: the caller's.
                let rest = unsafe { core::slice::from_raw_parts_mut(into.add(at), end - at) };
                match pread(&self.file, rest, (index * GRANULE + at) as u64) {
                    Ok(0) => return Err(ReadError::File(Errno::IO)),
                    Ok(n) => at += n,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(ReadError::File(errno)),
                }
            }
            for page in pages {
                // SAFETY: as above, and a sum of this space's.
                let (is, was) = unsafe {
                    let is = sum(into.add(page * PAGE), index, page);
                    (is, *sum_at(self.sums, index, page))
                };
                if is != was {
                    return Err(ReadError::Changed);
                }
            }
        }
        Ok(())
    }

    /// Gives the blocks of pages back to the file system. Where it can't, they
    /// are overwritten one day.
    pub(crate) fn drop_pages(&self, index: usize, pages: Range<usize>) {
        debug_assert!(index < self.granules);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let offset = (index * GRANULE + pages.start * PAGE) as u64;
        let _ = fallocate(&self.file, flags, offset, (pages.len() * PAGE) as u64);
    }

    /// Changes a byte of the file behind our back, for a test.
    #[cfg(test)]
    fn spoil(&self, offset: u64) {
        pwrite(&self.file, &[0xA5], offset).unwrap();
    }
}

/// One line on the program's stderr. The heap's threads have a descriptor table
/// of their own, without it.
pub(crate) fn complain(error: ReadError) {
    let text: &[u8] = match error {
        ReadError::File(_) => {
            b"dcmalloc: spilled memory is lost: its file cannot be read; touching it raises SIGBUS\n"
        }
        ReadError::Changed => {
            b"dcmalloc: spilled memory is lost: its file was changed; touching it raises SIGBUS\n"
        }
    };
    let process = rustix::process::getpid();
    let stderr = rustix::process::pidfd_open(process, rustix::process::PidfdFlags::empty())
        .and_then(|process| {
            let flags = rustix::process::PidfdGetfdFlags::empty();
            rustix::process::pidfd_getfd(process, libc::STDERR_FILENO, flags)
        });
    if let Ok(stderr) = stderr {
        // A reader that reads no more must not keep other granules away.
        let mut room = [PollFd::new(&stderr, PollFlags::OUT)];
        if poll(&mut room, Some(&Timespec::default())) == Ok(1) {
            let _ = rustix::io::write(&stderr, text);
        }
    }
}

/// A new file in `dir` that has no name, or loses it at once.
fn unnamed(dir: &CStr) -> Result<OwnedFd, Errno> {
    let access = OFlags::RDWR | OFlags::CLOEXEC;
    let private = Mode::RUSR | Mode::WUSR;
    match open(dir, access | OFlags::TMPFILE, private) {
        Err(Errno::OPNOTSUPP | Errno::ISDIR) => {}
        done => return done,
    }
    let name = c"/dcmalloc-spill";
    let mut path = [0u8; crate::config::SpillDir::MAX + 64];
    let (dir, name) = (dir.to_bytes(), name.to_bytes());
    path[..dir.len()].copy_from_slice(dir);
    path[dir.len()..][..name.len()].copy_from_slice(name);
    let mut digits = rustix::process::getpid().as_raw_nonzero().get();
    for byte in path[dir.len() + name.len()..].iter_mut().take(10) {
        *byte = b'0' + (digits % 10) as u8;
        digits /= 10;
    }
    let path = CStr::from_bytes_until_nul(&path).map_err(|_| Errno::NAMETOOLONG)?;
    let file = open(path, access | OFlags::CREATE | OFlags::EXCL, private)?;
    unlink(path)?;
    Ok(file)
}

/// # Safety
/// `index` and `page` are of the space that `sums` was made for.
unsafe fn sum_at(sums: *mut u32, index: usize, page: usize) -> *mut u32 {
    // SAFETY: the caller's.
    unsafe { sums.add(index * PAGES_PER_GRANULE + page) }
}

/// The checksum of a page, which depends on where it belongs.
///
/// # Safety
/// `at` is a readable page that nobody writes to.
unsafe fn sum(at: *const u8, index: usize, page: usize) -> u32 {
    // SAFETY: the caller's.
    let bytes = unsafe { core::slice::from_raw_parts(at, PAGE) };
    xxh3_64_with_seed(bytes, (index * PAGES_PER_GRANULE + page) as u64) as u32
}

/// # Safety
/// The piece is readable, and nobody writes to it.
unsafe fn write_all(file: impl AsFd, piece: Piece) -> Result<(), Errno> {
    // SAFETY: the caller's.
    let mut bytes = unsafe { core::slice::from_raw_parts(piece.from, piece.len) };
    let mut offset = piece.offset;
    while !bytes.is_empty() {
        match pwrite(&file, bytes, offset) {
            Ok(0) => return Err(Errno::IO),
            Ok(n) => {
                bytes = &bytes[n..];
                offset += n as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::PageMap;

    fn granule(seed: usize) -> Vec<u8> {
        (0..GRANULE)
            .map(|i| (i * 7 + i / PAGE + seed) as u8)
            .collect()
    }

    fn live(runs: &[(usize, usize)]) -> LivePages {
        let mut map = PageMap::EMPTY;
        for (start, end) in runs {
            map.insert(*start, end - start);
        }
        LivePages(*map.words())
    }

    fn spill() -> Spill {
        let dir = std::ffi::CString::new(std::env::temp_dir().to_str().unwrap()).unwrap();
        Spill::open(&dir, 64).unwrap()
    }

    fn blocks(spill: &Spill) -> u64 {
        rustix::fs::fstat(&spill.file).unwrap().st_blocks as u64 * 512
    }

    fn round_trip(mut spill: Spill) {
        let contents: Vec<_> = (0..6).map(granule).collect();
        let maps = [
            LivePages::ALL,
            live(&[(0, 1), (5, 9), (511, 512)]),
            live(&[]),
            live(&[(100, 400)]),
            // More runs than are ever under way at once.
            LivePages([0x5555_5555_5555_5555; 8]),
            LivePages::ALL,
        ];
        let all = || (0..6).map(|i| (10 + i * 3, contents[i].as_ptr(), &maps[i]));
        // SAFETY: vectors of this test.
        unsafe { spill.write(all()) }.unwrap();
        let pages: u64 = maps.iter().map(|live| u64::from(live.count())).sum();
        assert!(blocks(&spill) <= pages * PAGE as u64 + (1 << 20));
        for (index, content, live) in all() {
            let mut back = vec![0xEE; GRANULE];
            // SAFETY: as above.
            unsafe { spill.read(index, back.as_mut_ptr(), live) }.unwrap();
            for page in 0..PAGES_PER_GRANULE {
                let at = page * PAGE;
                // SAFETY: as above.
                let was = unsafe { core::slice::from_raw_parts(content.add(at), PAGE) };
                let is_live = live.0[page / 64] >> (page % 64) & 1 == 1;
                assert!(!is_live || back[at..at + PAGE] == *was, "{index} {page}");
                assert!(is_live || back[at..at + PAGE].iter().all(|b| *b == 0xEE));
            }
        }
        // What is dropped takes no blocks, and never comes back as zeroes.
        let before = blocks(&spill);
        spill.drop_pages(10, 0..256);
        assert!(before - blocks(&spill) >= 1 << 20);
        let mut back = vec![0; GRANULE];
        // SAFETY: as above.
        let mut read = |live: LivePages| unsafe { spill.read(10, back.as_mut_ptr(), &live) };
        assert_eq!(read(live(&[(0, 1)])), Err(ReadError::Changed));
        assert_eq!(read(live(&[(256, 512)])), Ok(()));
        spill.spoil((10 * GRANULE + 300 * PAGE) as u64);
        assert_eq!(read(live(&[(256, 512)])), Err(ReadError::Changed));
        assert_eq!(read(live(&[(301, 512)])), Ok(()));
        // Nothing was ever written there.
        assert_eq!(read(LivePages::ALL), Err(ReadError::Changed));
    }

    #[test]
    fn what_is_written_comes_back_or_is_refused() {
        let spill = spill();
        if !spill.has_ring() {
            println!("SKIPPED: no io_uring here (seccomp, or kernel.io_uring_disabled)");
            return;
        }
        round_trip(spill);
    }

    #[test]
    fn without_io_uring_it_is_the_same() {
        let mut spill = spill();
        spill.ring = None;
        round_trip(spill);
    }

    #[test]
    fn a_file_that_takes_no_more_is_an_error() {
        let mut spill = spill();
        let content = granule(1);
        for with_ring in [true, false] {
            if !with_ring {
                spill.ring = None;
            }
            // A descriptor that can't be written to stands for a full disk.
            let file = std::mem::replace(
                &mut spill.file,
                open(c"/dev/full", OFlags::RDWR, Mode::empty()).unwrap(),
            );
            let all = [(1, content.as_ptr(), &LivePages::ALL)];
            // SAFETY: a vector of this test.
            let written = unsafe { spill.write(all.into_iter()) };
            assert_eq!(written, Err(Errno::NOSPC));
            spill.file = file;
        }
    }
}
