//! Granules that stand still while their owner forks: placeholders over runs
//! of extents, with a userfaultfd that the source serves. A child inherits
//! them, and what its parent had is copied to whoever touches it.

use super::placeholder::is_empty;
use super::staging::{advise, allow_access, map_nothing, unmap};
use super::uffd::{Uffd, UffdError};
use super::{GRANULE, RUN};
use core::ffi::c_void;
use core::mem::ManuallyDrop;
use core::ops::Range;
use rustix::fd::{BorrowedFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::mm::{Advice, MremapFlags, mremap, mremap_fixed, munlock};

/// A userfaultfd for forks. Whoever reads its events serves it; this process
/// covers and uncovers.
#[derive(Debug)]
pub struct Shelter {
    /// Never closed here, though whoever serves has it too.
    uffd: ManuallyDrop<Uffd>,
}

impl Shelter {
    /// Opens a new userfaultfd with the right to hold up the kernel's own
    /// accesses, for somebody else to set up (`UFFDIO_API`).
    ///
    /// # Errors
    /// This process has no such right.
    pub fn open(device: Option<BorrowedFd<'_>>) -> Result<Self, UffdError> {
        let uffd = ManuallyDrop::new(Uffd::open_raw(device)?);
        Ok(Self { uffd })
    }

    /// One that was opened before.
    ///
    /// # Safety
    /// `fd` is [`Shelter::as_raw`] of one opened on a thread that shares its
    /// descriptor table with the caller's.
    pub unsafe fn from_raw(fd: i32) -> Self {
        // SAFETY: the caller's; and it is never closed.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let uffd = ManuallyDrop::new(Uffd::from_fd(fd));
        Self { uffd }
    }

    /// Its number.
    pub fn as_raw(&self) -> i32 {
        self.uffd.as_raw()
    }

    /// For the one who serves.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// Puts a placeholder over granules: from now on whoever touches one waits
    /// for the one who serves. Returns when that one has read of the move.
    ///
    /// # Errors
    /// The kernel's; nothing was changed then.
    ///
    /// # Safety
    /// The granules are the caller's, and what is in them stays readable
    /// elsewhere.
    pub unsafe fn cover(&self, at: Range<usize>) -> Result<(), Errno> {
        let (cover, len) = (reserve(at.len())?, at.len());
        let placed = || {
            // As in `placeholder::build`, except that a child inherits it.
            // SAFETY: a mapping of ours; unlocking changes no content.
            unsafe { munlock(cover as *mut c_void, len) }?;
            self.uffd.register(cover, len)?;
            allow_access(cover, len)?;
            for part in (cover..cover + len).step_by(RUN * GRANULE) {
                if !is_empty(part, (cover + len - part).min(RUN * GRANULE))? {
                    return Err(Errno::BUSY);
                }
            }
            let to = at.start as *mut c_void;
            // SAFETY: the caller's to replace; the source is ours.
            unsafe { mremap_fixed(cover as *mut _, len, len, MremapFlags::MAYMOVE, to) }.map(drop)
        };
        let result = placed();
        if result.is_err() {
            unmap(cover, len);
        }
        result
    }

    /// Puts extents back in place of a placeholder, and wakes who waits.
    ///
    /// # Errors
    /// The kernel's (`ENOMEM`); the placeholder is still there then.
    ///
    /// # Safety
    /// The granules are covered; their content is that of as many bytes of a
    /// shared mapping from `alias` on, and nobody else maps it any more.
    pub unsafe fn uncover(&self, at: Range<usize>, alias: usize) -> Result<(), Errno> {
        let (len, may_move) = (at.len(), MremapFlags::MAYMOVE);
        // SAFETY: a shared mapping with an old size of 0 is duplicated.
        let extents = unsafe { mremap(alias as *mut c_void, 0, len, may_move) }?;
        let placed = || {
            advise(extents as usize, len, Advice::LinuxDontFork)?;
            advise(extents as usize, len, Advice::LinuxDontDump)?;
            // SAFETY: the source is ours, the target the caller's to replace.
            unsafe { mremap_fixed(extents, len, len, may_move, at.start as *mut c_void) }
        };
        if let Err(errno) = placed() {
            unmap(extents as usize, len);
            return Err(errno);
        }
        self.uffd.wake(at.start, len)
    }

    /// Makes ordinary memory of granules that have all their pages.
    pub fn release(&self, at: Range<usize>) {
        // Fails where nothing is registered: then it is done already.
        let _ = self.uffd.unregister(at.start, at.len());
    }
}

/// Granules without access, at an address of the kernel's choice.
fn reserve(len: usize) -> Result<usize, Errno> {
    let wide = map_nothing(len + GRANULE)?;
    let at = wide.next_multiple_of(GRANULE);
    unmap(wide, at - wide);
    unmap(at + len, wide + GRANULE - at);
    Ok(at)
}
