//! The broker's own mapping of the window: wiping, and making huge pages ready.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::protocol::{GRANULE, WindowRange};

/// The device's memory as a file, mapped for the broker's own use.
///
/// All of it is mapped at once; the broker only touches what is accepted and free.
#[derive(Debug)]
pub struct Window {
    fd: OwnedFd,
    base: u64,
    len: u64,
    /// Start of the reservation, of `len + GRANULE` bytes.
    reservation: NonNull<u8>,
    /// Start of the window in it, aligned to a granule so that huge pages fit.
    start: NonNull<u8>,
}

// SAFETY: the window is memory shared with other processes and only reached
// through raw pointers in `&mut self` methods; the descriptor is plain data.
unsafe impl Send for Window {}

impl Window {
    /// Maps `len` bytes (rounded down to granules) of `fd` from `base`, which
    /// must be a multiple of the page size; of the granule for huge pages.
    pub fn map(fd: OwnedFd, base: u64, len: u64) -> Result<Self, Errno> {
        let len = len - len % GRANULE;
        if len == 0 {
            return Err(Errno::INVAL);
        }
        let size = usize::try_from(len + GRANULE).map_err(|_| Errno::NOMEM)?;
        // SAFETY: a new reservation at an address of the kernel's choice.
        let reserved = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                size,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let reservation = NonNull::new(reserved.cast::<u8>()).ok_or(Errno::FAULT)?;
        let skip = reserved.align_offset(GRANULE as usize);
        // SAFETY: `skip` is less than a granule, which the reservation has to spare.
        let start = unsafe { reservation.add(skip) };
        let window = Self {
            fd,
            base,
            len,
            reservation,
            start,
        };
        // SAFETY: replaces part of our own, still unused reservation: `skip +
        // len` is below `len + GRANULE`.
        unsafe {
            mmap(
                start.as_ptr().cast(),
                len as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                &window.fd,
                base,
            )
        }?;
        Ok(window)
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
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the window shows nothing; never, a window has at least a granule.
    pub fn is_empty(&self) -> bool {
        self.len == 0
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
                    self.fill_zero(done);
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

    fn fill_zero(&mut self, offset: u64) {
        assert!(offset.is_multiple_of(GRANULE) && offset < self.len);
        // SAFETY: one granule inside the mapping. It is free: no process of
        // ours maps it, and this is memory of another process at worst, never
        // a Rust object of this one.
        unsafe {
            ptr::write_bytes(
                self.start.as_ptr().add(offset as usize),
                0,
                GRANULE as usize,
            )
        };
    }

    /// Makes the free and zeroed granule at `offset` present as one huge page
    /// (`MADV_COLLAPSE`, Linux 6.1), so that a client's first touch takes one
    /// fault instead of 512. A few milliseconds. `false` where that is impossible.
    pub(super) fn warm(&mut self, offset: u64) -> bool {
        assert!(offset.is_multiple_of(GRANULE) && offset < self.len);
        // SAFETY: as in `fill_zero`; the byte is zero already, writing it makes
        // the page table that collapsing needs.
        let collapsed = unsafe {
            let granule = self.start.as_ptr().add(offset as usize);
            granule.write_volatile(0);
            libc::madvise(granule.cast(), GRANULE as usize, libc::MADV_COLLAPSE)
        };
        collapsed == 0
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

impl Drop for Window {
    fn drop(&mut self) {
        let size = (self.len + GRANULE) as usize;
        // SAFETY: the whole reservation, made in `map`; nothing points into it.
        let _ = unsafe { munmap(self.reservation.as_ptr().cast(), size) };
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
