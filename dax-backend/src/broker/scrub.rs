//! The window as the broker has it: mapped, to wipe what a lease leaves behind.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::io::Errno;

use super::mapping::Mapping;

use super::protocol::{GRANULE, WindowRange};

/// Bytes wiped with one system call: a millisecond or two if all of them are there.
const PUNCHED_AT_ONCE: u64 = 4 * GRANULE;

/// The device's memory as a file, mapped for the broker's own use.
///
/// All of it is mapped at once; the broker only touches what is accepted and free.
#[derive(Debug)]
pub struct Window {
    fd: OwnedFd,
    base: u64,
    mapping: Arc<Mapping>,
    /// Whether caches have to be emptied before memory leaves.
    flushes: bool,
}

/// How far wiping came.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wiped {
    /// Reads as zero now.
    pub(super) zeroed: WindowRange,
    /// The granule after it that can't be written: poisoned, or taken away.
    pub(super) broken: Option<u64>,
}

impl Window {
    /// Maps `len` bytes (rounded down to granules) of `fd` from `base`, which
    /// must be a multiple of the page size; of the granule for huge pages.
    pub fn map(fd: OwnedFd, base: u64, len: u64) -> Result<Self, Errno> {
        let mapping = Arc::new(Mapping::new(fd.as_fd(), base, len - len % GRANULE)?);
        Ok(Self {
            fd,
            base,
            mapping,
            flushes: false,
        })
    }

    /// As [`map`](Self::map), for a device's own memory: a cache line written back after the
    /// release would hit what is another host's memory by then, so no line of it may be left.
    pub fn of_device(fd: OwnedFd, base: u64, len: u64) -> Result<Self, Errno> {
        let window = Self::map(fd, base, len)?;
        Ok(Self {
            flushes: true,
            ..window
        })
    }

    /// A window of `len` bytes with nothing of a device in it, for capacity that is not reached
    /// through the broker: what is wiped of it costs nothing.
    pub fn hollow(len: u64) -> Result<Self, Errno> {
        let fd = memfd_create("dcmalloc-hollow", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len)?;
        Self::map(fd, 0, len)
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

    /// Wipes `range` from its start until `budget` is used up, at least a
    /// little, and stops at what can't be written.
    ///
    /// A memfd's small pages are given back to the system, which is quicker
    /// than writing them and leaves room for a huge page. `huge` pages were
    /// dear to make: they are kept, and written.
    pub(super) fn wipe(&self, range: WindowRange, huge: bool, budget: Duration) -> Wiped {
        let started = Instant::now();
        let mut written = huge;
        let mut done = 0;
        while done < range.len {
            let largest = if written { GRANULE } else { PUNCHED_AT_ONCE };
            let step = (range.len - done).min(largest);
            let part = WindowRange {
                offset: range.offset + done,
                len: step,
            };
            if !written && self.punch(part).is_err() {
                // Then it has to be written, which takes longer.
                written = true;
                continue;
            }
            if written && self.mapping.fill_zero(part.offset).is_err() {
                return Wiped {
                    zeroed: WindowRange { len: done, ..range },
                    broken: Some(part.offset),
                };
            }
            done += step;
            if started.elapsed() >= budget {
                break;
            }
        }
        Wiped {
            zeroed: WindowRange { len: done, ..range },
            broken: None,
        }
    }

    /// Wipes `range` before it leaves: whoever gets it next need not be
    /// careful. What can't be written can't be read either.
    pub(super) fn discard(&self, mut range: WindowRange) {
        while range.len > 0 {
            let wiped = self.wipe(range, false, Duration::MAX);
            if self.flushes {
                self.mapping.flush(wiped.zeroed.offset, wiped.zeroed.len);
            }
            let done = wiped.zeroed.len + wiped.broken.map_or(0, |_| GRANULE);
            range.offset += done;
            range.len -= done;
        }
    }

    /// Makes `range` a hole, which reads as zero; a device file can't have any.
    fn punch(&self, range: WindowRange) -> Result<(), Errno> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.fd, flags, self.base + range.offset, range.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::SealFlags;
    use rustix::io::{pread, pwrite};

    fn window(granules: u64) -> Window {
        let fd = memfd_create("window", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, granules * GRANULE).unwrap();
        Window::map(fd, 0, granules * GRANULE).unwrap()
    }

    fn granules(first: u64, count: u64) -> WindowRange {
        WindowRange {
            offset: first * GRANULE,
            len: count * GRANULE,
        }
    }

    fn resident(window: &Window) -> u64 {
        rustix::fs::fstat(window.fd()).unwrap().st_blocks as u64 * 512
    }

    #[test]
    fn wiping_zeroes_and_gives_small_pages_back() {
        let window = window(4);
        for huge in [false, true] {
            pwrite(window.fd(), b"secret", 2 * GRANULE + 77).unwrap();
            let wiped = window.wipe(granules(2, 2), huge, Duration::MAX);
            assert_eq!((wiped.zeroed, wiped.broken), (granules(2, 2), None));
            let mut bytes = [1; 6];
            pread(window.fd(), &mut bytes, 2 * GRANULE + 77).unwrap();
            assert_eq!(bytes, [0; 6]);
            assert_eq!(resident(&window), if huge { 2 * GRANULE } else { 0 });
        }
    }

    #[test]
    fn wiping_stops_at_the_budget_and_says_how_far_it_came() {
        let window = window(3);
        let wiped = window.wipe(granules(0, 3), true, Duration::ZERO);
        assert_eq!(wiped.zeroed, granules(0, 1));
    }

    /// A device's memory can't be punched and may be slow: eight megabytes between two looks at the clock kept
    /// a broker silent for longer than its clients wait.
    #[test]
    fn a_file_without_holes_is_written_within_the_budget() {
        let window = window(4);
        rustix::fs::fcntl_add_seals(window.fd(), SealFlags::FUTURE_WRITE).unwrap();
        let wiped = window.wipe(granules(0, 4), false, Duration::ZERO);
        assert_eq!(wiped.zeroed, granules(0, 1));
    }

    #[test]
    fn a_file_without_holes_is_written() {
        let window = window(2);
        pwrite(window.fd(), &[7; 4096], GRANULE).unwrap();
        // Sealed against writing, it refuses holes; the mapping stays.
        rustix::fs::fcntl_add_seals(window.fd(), SealFlags::FUTURE_WRITE).unwrap();
        assert!(window.punch(granules(1, 1)).is_err());
        window.discard(granules(1, 1));
        let mut bytes = [1; 4096];
        pread(window.fd(), &mut bytes, GRANULE).unwrap();
        assert_eq!(bytes, [0; 4096]);
    }

    #[test]
    fn a_device_s_memory_is_flushed_and_says_the_same() {
        let fd = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, 2 * GRANULE).unwrap();
        let window = Window::of_device(fd, 0, 2 * GRANULE).unwrap();
        pwrite(window.fd(), &[7; 4096], GRANULE).unwrap();
        window.mapping.flush(0, 2 * GRANULE);
        window.discard(granules(0, 1));
        let mut bytes = [1; 4096];
        pread(window.fd(), &mut bytes, GRANULE).unwrap();
        assert_eq!(bytes, [7; 4096]);
    }

    /// Memory that was taken away or is poisoned raises SIGBUS where it is
    /// touched, and wiping would have ended the broker of a whole machine.
    #[test]
    fn memory_that_faults_is_named_and_the_rest_wiped() {
        let window = window(3);
        pwrite(window.fd(), &[7; 4096], 0).unwrap();
        // What lies behind the end of the file faults as a lost extent does.
        ftruncate(window.fd(), GRANULE).unwrap();
        rustix::fs::fcntl_add_seals(window.fd(), SealFlags::FUTURE_WRITE).unwrap();
        let wiped = window.wipe(granules(0, 3), false, Duration::MAX);
        assert_eq!(
            (wiped.zeroed, wiped.broken),
            (granules(0, 1), Some(GRANULE))
        );
        let mut bytes = [1; 4096];
        pread(window.fd(), &mut bytes, 0).unwrap();
        assert_eq!(bytes, [0; 4096]);
        window.discard(granules(0, 3));
    }
}
