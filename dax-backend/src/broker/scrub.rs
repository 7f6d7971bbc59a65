//! The window as the broker has it: mapped, to wipe what a lease leaves behind.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use super::mapping::Mapping;

use super::protocol::{GRANULE, WindowRange};

/// The device's memory as a file, mapped for the broker's own use.
///
/// All of it is mapped at once; the broker only touches what is accepted and free.
#[derive(Debug)]
pub struct Window {
    fd: OwnedFd,
    base: u64,
    mapping: Arc<Mapping>,
}

impl Window {
    /// Maps `len` bytes (rounded down to granules) of `fd` from `base`, which
    /// must be a multiple of the page size; of the granule for huge pages.
    pub fn map(fd: OwnedFd, base: u64, len: u64) -> Result<Self, Errno> {
        let mapping = Arc::new(Mapping::new(fd.as_fd(), base, len - len % GRANULE)?);
        Ok(Self { fd, base, mapping })
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Where the window starts in the file.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes of the window.
    #[expect(clippy::len_without_is_empty, reason = "a window is never empty")]
    pub fn len(&self) -> u64 {
        self.mapping.len()
    }

    pub(super) fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Zeroes `range` from its start until `budget` is used up, at least one
    /// granule. Returns what reads as zero now. Where the file has holes
    /// (a memfd's, never touched) there is nothing to do.
    pub(super) fn zero(&mut self, range: WindowRange, budget: Duration) -> WindowRange {
        let started = Instant::now();
        let mut done = range.offset;
        while done < range.end() {
            match self.next_data(done) {
                Some(data) if data >= range.end() => done = range.end(),
                Some(data) if data >= done + GRANULE => done = data - data % GRANULE,
                _ => {
                    self.mapping.fill_zero(done);
                    done += GRANULE;
                    if started.elapsed() >= budget {
                        break;
                    }
                }
            }
        }
        WindowRange {
            offset: range.offset,
            len: done - range.offset,
        }
    }

    /// First byte of data at or after `offset`; `None` where the file can't say.
    fn next_data(&self, offset: u64) -> Option<u64> {
        match seek(&self.fd, SeekFrom::Data(self.base + offset)) {
            Ok(at) => Some(at.saturating_sub(self.base)),
            // No data up to the end of the file.
            Err(Errno::NXIO) => Some(u64::MAX),
            // A device file has no holes.
            Err(_) => None,
        }
    }

    /// Wipes `range` before it leaves: whoever gets it next need not be careful.
    /// A memfd gives its pages back to the system.
    pub(super) fn discard(&mut self, range: WindowRange) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.fd, flags, self.base + range.offset, range.len).is_err() {
            self.zero(range, Duration::MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::io::{pread, pwrite};

    fn window(granules: u64) -> Window {
        let fd = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, granules * GRANULE).unwrap();
        Window::map(fd, 0, granules * GRANULE).unwrap()
    }

    fn granules(first: u64, count: u64) -> WindowRange {
        WindowRange {
            offset: first * GRANULE,
            len: count * GRANULE,
        }
    }

    #[test]
    fn zeroing_wipes_data_and_leaves_holes() {
        let mut window = window(4);
        pwrite(window.fd(), b"secret", 2 * GRANULE + 77).unwrap();
        assert_eq!(window.zero(granules(0, 4), Duration::MAX), granules(0, 4));
        let mut bytes = [1; 6];
        pread(window.fd(), &mut bytes, 2 * GRANULE + 77).unwrap();
        assert_eq!(bytes, [0; 6]);
        // Only the granule with data was touched.
        let blocks = rustix::fs::fstat(window.fd()).unwrap().st_blocks * 512;
        assert_eq!(blocks as u64, GRANULE);
    }

    #[test]
    fn zeroing_stops_at_the_budget_and_says_how_far_it_came() {
        let mut window = window(3);
        for granule in 0..3 {
            pwrite(window.fd(), b"x", granule * GRANULE).unwrap();
        }
        assert_eq!(window.zero(granules(0, 3), Duration::ZERO), granules(0, 1));
    }

    #[test]
    fn discarding_gives_the_pages_back() {
        let mut window = window(2);
        pwrite(window.fd(), &[7; 4096], GRANULE).unwrap();
        window.discard(granules(1, 1));
        assert_eq!(rustix::fs::fstat(window.fd()).unwrap().st_blocks, 0);
    }
}
