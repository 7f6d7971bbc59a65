//! The broker's own mapping of the window's file.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{Ordering, fence};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::protocol::GRANULE;

/// No line is shorter on the processors that have CXL.
const CACHE_LINE: usize = 64;

/// Writes the cache line at `address` back and drops it.
///
/// # Safety
/// `address` is mapped.
#[cfg(target_arch = "x86_64")]
unsafe fn flush_line(address: *const u8) {
    // SAFETY: every x86-64 has it; the caller has the rest.
    unsafe { core::arch::x86_64::_mm_clflush(address) };
}

/// Writes the cache line at `address` back and drops it.
///
/// # Safety
/// `address` is mapped.
#[cfg(target_arch = "aarch64")]
unsafe fn flush_line(address: *const u8) {
    // SAFETY: Linux allows it to user space; the caller has the rest.
    unsafe {
        core::arch::asm!("dc civac, {0}", in(reg) address, options(nostack, preserves_flags))
    };
}

/// All of the window, mapped at once; only what is accepted is touched.
#[derive(Debug)]
pub(super) struct Mapping {
    len: u64,
    /// Start of the reservation, of `len + GRANULE` bytes.
    reservation: NonNull<u8>,
    /// Start of the window in it, aligned to a granule so that huge pages fit.
    start: NonNull<u8>,
    /// `/dev/zero`.
    zeroes: File,
}

// SAFETY: the pointers stay valid until drop and are only used for raw memory
// that other processes share anyway; no reference to it is ever made.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, whole granules, of `fd` from `base`.
    pub(super) fn new(fd: BorrowedFd<'_>, base: u64, len: u64) -> Result<Self, Errno> {
        if len == 0 || !len.is_multiple_of(GRANULE) {
            return Err(Errno::INVAL);
        }
        let zeroes = File::open("/dev/zero").map_err(|error| {
            error
                .raw_os_error()
                .map_or(Errno::IO, Errno::from_raw_os_error)
        })?;
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
        let skip = reserved.cast::<u8>().align_offset(GRANULE as usize);
        // SAFETY: `skip` is less than a granule, which the reservation has to spare.
        let start = unsafe { reservation.add(skip) };
        // From here on `mapping` unmaps what there is.
        let mapping = Self {
            len,
            reservation,
            start,
            zeroes,
        };
        // SAFETY: replaces part of our own, still unused reservation: `skip +
        // len` is below `len + GRANULE`.
        unsafe {
            mmap(
                start.as_ptr().cast(),
                len as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                fd,
                base,
            )
        }?;
        Ok(mapping)
    }

    /// Bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The address of the granule at `offset`, for the kernel to copy from.
    pub(super) fn address(&self, offset: u64) -> u64 {
        self.granule(offset).as_ptr() as u64
    }

    fn granule(&self, offset: u64) -> NonNull<u8> {
        assert!(offset.is_multiple_of(GRANULE) && offset < self.len);
        // SAFETY: inside the mapping.
        unsafe { self.start.add(offset as usize) }
    }

    /// Zeroes the granule at `offset`, which is free: no client maps it.
    ///
    /// The kernel writes it, by a read of `/dev/zero`: where the memory is
    /// poisoned or gone that is an error, and not a SIGBUS (read(2), `EFAULT`).
    ///
    /// # Errors
    /// The memory can't be written.
    pub(super) fn fill_zero(&self, offset: u64) -> Result<(), Errno> {
        let granule = self.granule(offset).as_ptr();
        let mut done = 0;
        while done < GRANULE as usize {
            // SAFETY: the kernel writes at most the rest of one granule of
            // mapped memory that is no Rust object.
            let read = unsafe {
                let at = granule.add(done).cast();
                libc::read(self.zeroes.as_raw_fd(), at, GRANULE as usize - done)
            };
            match usize::try_from(read) {
                Ok(0) => return Err(Errno::IO),
                Ok(read) => done += read,
                Err(_) => match std::io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR) => {}
                    errno => return Err(errno.map_or(Errno::IO, Errno::from_raw_os_error)),
                },
            }
        }
        Ok(())
    }

    /// Writes back and drops what caches hold of `len` bytes, whole granules, at `offset`.
    /// They must be there: this touches them as a read does.
    pub(super) fn flush(&self, offset: u64, len: u64) {
        for granule in (offset..offset + len).step_by(GRANULE as usize) {
            let granule = self.granule(granule).as_ptr();
            for line in (0..GRANULE as usize).step_by(CACHE_LINE) {
                // SAFETY: a line of mapped memory; its contents stay.
                unsafe { flush_line(granule.add(line)) };
            }
        }
        fence(Ordering::SeqCst);
    }

    /// Makes the granule at `offset` present as one huge page (`MADV_COLLAPSE`,
    /// Linux 6.1). Its contents stay as they are, whoever uses it meanwhile.
    /// Takes milliseconds. `false` where it can't be done.
    pub(super) fn collapse(&self, offset: u64) -> bool {
        let granule = self.granule(offset).as_ptr().cast();
        // Collapsing needs a page table, so a first page is faulted in.
        // SAFETY: neither call changes what the memory says.
        unsafe {
            libc::madvise(granule, 4096, libc::MADV_POPULATE_WRITE) == 0
                && libc::madvise(granule, GRANULE as usize, libc::MADV_COLLAPSE) == 0
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let size = (self.len + GRANULE) as usize;
        // SAFETY: the whole reservation, made in `new`; nothing points into it.
        let _ = unsafe { munmap(self.reservation.as_ptr().cast(), size) };
    }
}
