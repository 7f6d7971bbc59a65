//! A mapping on which every access waits.

use super::staging::{Staging, advise, allow_access, last_error};
use super::uffd::Uffd;
use super::{GRANULE, PAGE, RUN};
use core::ffi::c_void;
use rustix::io::Errno;
use rustix::mm::{Advice, munlock};

/// Why a placeholder could not be made. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PlaceholderError {
    System(Errno),
    /// Some page of it is there, so accesses to it would not wait.
    Populated,
}

impl From<Errno> for PlaceholderError {
    fn from(errno: Errno) -> Self {
        Self::System(errno)
    }
}

/// Makes a placeholder for `n` granules, ready to be moved over them.
///
/// A program that called mlockall(MCL_FUTURE) has the kernel populate every
/// new mapping, and a populated placeholder makes nobody wait. Hence the
/// order: no access, not locked, registered, then access; and a look.
///
/// It is not inherited: a child has no userfaultfd that makes it wait, and
/// would read zeroes where its parent has data.
pub(super) fn build(uffd: &Uffd, n: usize) -> Result<Staging, PlaceholderError> {
    let mut staging = Staging::EMPTY;
    staging.reserve(0, n)?;
    let (at, len) = (staging.granule(0), n * GRANULE);
    // SAFETY: a mapping of ours; unlocking changes no content.
    unsafe { munlock(at as *mut c_void, len) }?;
    advise(at, len, Advice::LinuxDontFork)?;
    uffd.register(at, len)?;
    allow_access(at, len)?;
    match is_empty(at, len)? {
        true => Ok(staging),
        false => Err(PlaceholderError::Populated),
    }
}

/// Whether no page of the range is in memory (mincore(2)).
pub(super) fn is_empty(at: usize, len: usize) -> Result<bool, Errno> {
    let mut pages = [0u8; RUN * GRANULE / PAGE];
    // SAFETY: mincore writes a byte per page of the range, at most as many as
    // `pages` has.
    let done = unsafe { libc::mincore(at as *mut c_void, len, pages.as_mut_ptr()) };
    match done {
        0 => Ok(pages[..len / PAGE].iter().all(|page| page & 1 == 0)),
        _ => Err(last_error()),
    }
}
