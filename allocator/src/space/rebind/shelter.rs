//! Granules that stand still while their owner forks: placeholders over runs
//! of extents, with a userfaultfd that the source serves. A child inherits
//! them, and what its parent had is copied to whoever touches it.

use super::placeholder::is_empty;
use super::staging::{advise, allow_access, make_present, map_nothing, unmap};
use super::uffd::{Uffd, UffdError};
use super::{GRANULE, PAGE, RUN};
use crate::space::present;
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

    /// Closes it: what is behind placeholders is zeroes from now on.
    pub fn close(self) {
        drop(ManuallyDrop::into_inner(self.uffd));
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

    /// Moves the pages of granules on extents out of the way, to where nobody
    /// looks for them, so that [`Self::cover`] need not unmap each: the kernel
    /// moves their page tables whole. Who touches one maps its page anew.
    /// Returns what to unmap once there is time.
    ///
    /// # Errors
    /// The kernel's, also where they are more than one mapping; `EOPNOTSUPP`
    /// where they must be present, because no touch maps a page there. Nothing
    /// was changed then.
    ///
    /// # Safety
    /// The granules are the caller's, and one shared mapping.
    pub unsafe fn set_aside(at: Range<usize>) -> Result<Aside, Errno> {
        if present::is_needed() {
            return Err(Errno::OPNOTSUPP);
        }
        let (aside, len) = (reserve(at.len())?, at.len());
        let flags = MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP;
        let (from, to) = (at.start as *mut c_void, aside as *mut c_void);
        // SAFETY: the source is the caller's, and stays mapped; the target ours.
        match unsafe { mremap_fixed(from, len, len, flags, to) } {
            Ok(_) => Ok(Aside { at: aside, len }),
            Err(errno) => {
                unmap(aside, len);
                Err(errno)
            }
        }
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
            // What can't be had any more raises SIGBUS when it is touched.
            let _ = make_present(extents as usize, len);
            // SAFETY: the source is ours, the target the caller's to replace.
            unsafe { mremap_fixed(extents, len, len, may_move, at.start as *mut c_void) }
        };
        if let Err(errno) = placed() {
            unmap(extents as usize, len);
            return Err(errno);
        }
        self.uffd.wake(at.start, len)
    }
}

/// Pages that were moved out of the way; see [`Shelter::set_aside`].
#[derive(Debug)]
pub struct Aside {
    at: usize,
    len: usize,
}

impl Drop for Aside {
    /// In pieces, because others wait for the mappings meanwhile.
    fn drop(&mut self) {
        for part in (self.at..self.at + self.len).step_by(RUN * GRANULE) {
            unmap(part, (self.at + self.len - part).min(RUN * GRANULE));
        }
    }
}

/// A page that shows to each descendant what names it to the one who serves:
/// it is never touched in the process that made it, and filled when a
/// descendant reads it.
#[derive(Debug)]
pub struct Mark(usize);

impl Mark {
    /// A new one.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> Result<Self, Errno> {
        let at = map_nothing(PAGE)?;
        // SAFETY: a mapping of ours; unlocking changes no content.
        let made = unsafe { munlock(at as *mut c_void, PAGE) };
        if let Err(errno) = made {
            unmap(at, PAGE);
            return Err(errno);
        }
        Ok(Self(at))
    }

    /// Its address, for [`Self::read`] in descendants.
    pub fn addr(&self) -> usize {
        self.0
    }

    /// Has whoever reads it wait for the one who serves the shelter.
    ///
    /// # Errors
    /// The kernel's.
    pub fn register(&self, shelter: &Shelter) -> Result<(), Errno> {
        shelter.uffd.register(self.0, PAGE)?;
        allow_access(self.0, PAGE)
    }

    /// What names this process; zeroes if nobody serves it any more. What an
    /// ancestor read there is not shown.
    ///
    /// # Errors
    /// The kernel's.
    ///
    /// # Safety
    /// `at` is an address of an ancestor's, which nobody else of this process
    /// touches.
    pub unsafe fn read(at: usize) -> Result<[u64; 2], Errno> {
        advise(at, PAGE, Advice::LinuxDontNeed)?;
        // SAFETY: a page of anonymous memory, aligned.
        Ok(unsafe { (at as *const [u64; 2]).read_volatile() })
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

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags, mmap};

    /// Pages of a granule that the process's own tables have.
    fn mapped_pages(at: usize) -> usize {
        use std::os::unix::fs::FileExt;
        let pages = std::fs::File::open("/proc/self/pagemap").unwrap();
        let mut words = vec![0u8; GRANULE / PAGE * 8];
        pages
            .read_exact_at(&mut words, (at / PAGE * 8) as u64)
            .unwrap();
        // Documentation/admin-guide/mm/pagemap.rst: the top bit of each word.
        words
            .chunks_exact(8)
            .filter(|word| word[7] & 0x80 != 0)
            .count()
    }

    /// On a DAX device whoever forbids huge pages can't have a page by
    /// touching it. What other tests map from then on is present, too.
    #[test]
    fn what_must_be_present_is_put_back_so_and_not_set_aside() {
        let file = memfd_create(c"window", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, GRANULE as u64).unwrap();
        let (access, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        let to = core::ptr::null_mut();
        // SAFETY: a new mapping.
        let alias = unsafe { mmap(to, GRANULE, access, shared, &file, 0) }.unwrap() as usize;
        let granule = || {
            let at = reserve(GRANULE).unwrap();
            allow_access(at, GRANULE).unwrap();
            at
        };
        // One that was never set up wakes nobody, which is all that is asked.
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(1);
        // SAFETY: it serves nothing.
        let uffd = unsafe { rustix::mm::userfaultfd(flags) }.unwrap();
        let uffd = ManuallyDrop::new(Uffd::from_fd(uffd));
        let shelter = Shelter { uffd };
        let [before, after] = [granule(), granule()];
        // SAFETY: granules of this test's, which nobody reads.
        unsafe {
            let _ = shelter.uncover(before..before + GRANULE, alias);
            present::window_is_a_device();
            let _ = shelter.uncover(after..after + GRANULE, alias);
        }
        assert_eq!(mapped_pages(before), 0);
        assert_eq!(mapped_pages(after), GRANULE / PAGE);
        // SAFETY: as above.
        let aside = unsafe { Shelter::set_aside(after..after + GRANULE) };
        assert_eq!(aside.err(), Some(Errno::OPNOTSUPP));
        assert_eq!(mapped_pages(after), GRANULE / PAGE);
    }
}
