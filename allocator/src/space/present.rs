//! Pages of a window that is a DAX device: huge ones or none.
//!
//! A device-DAX mapping whose alignment is 2 MiB is not mapped page by page. A process that forbids
//! huge pages (`PR_SET_THP_DISABLE`, prctl(2); redis-server does so where the system makes them
//! always) gets SIGBUS for the first touch of each granule. So granules of such a window are made
//! present when they are mapped, and for that moment huge pages are allowed.
#![forbid(unsafe_code)]

use core::sync::atomic::{AtomicBool, Ordering};
use rustix::io::Errno;
use rustix::thread::{disable_transparent_huge_pages, transparent_huge_pages_are_disabled};

/// Whether the window is such a device. There is one window in a process.
static DEVICE: AtomicBool = AtomicBool::new(false);
/// Another thread may forbid them again before this one's pages are there.
const ATTEMPTS: usize = 4;

/// From now on granules are made present when they are mapped.
pub(crate) fn window_is_a_device() {
    DEVICE.store(true, Ordering::Relaxed);
}

/// Whether a granule must be present before anyone touches it.
pub(super) fn is_needed() -> bool {
    DEVICE.load(Ordering::Relaxed)
}

/// Has `populate` make pages present (`MADV_POPULATE_WRITE`, madvise(2)), if need be with huge pages
/// allowed meanwhile. A program that changes its mind in that moment is not heard.
pub(super) fn populate(populate: impl Fn() -> Result<(), Errno>) -> Result<(), Errno> {
    let mut done = populate();
    if done == Err(Errno::FAULT) && transparent_huge_pages_are_disabled() == Ok(true) {
        for _ in 0..ATTEMPTS {
            disable_transparent_huge_pages(false)?;
            done = populate();
            if done != Err(Errno::FAULT) {
                break;
            }
        }
        disable_transparent_huge_pages(true)?;
    }
    match done {
        // Before Linux 5.14 whoever touches them finds out.
        Err(Errno::INVAL) => Ok(()),
        done => done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    /// What a process forbids is forbidden afterwards, whatever came of it.
    #[test]
    fn huge_pages_are_allowed_for_the_moment_only() {
        let disabled = || transparent_huge_pages_are_disabled().unwrap();
        assert!(!disabled());
        assert_eq!(populate(|| Err(Errno::FAULT)), Err(Errno::FAULT));
        disable_transparent_huge_pages(true).unwrap();
        let seen = Cell::new(0);
        let like_a_device = || {
            seen.set(seen.get() + 1);
            if disabled() {
                Err(Errno::FAULT)
            } else {
                Ok(())
            }
        };
        let done = populate(like_a_device);
        let (kept, gone) = (disabled(), populate(|| Err(Errno::FAULT)));
        let still = disabled();
        disable_transparent_huge_pages(false).unwrap();
        assert_eq!((done, seen.get(), kept), (Ok(()), 2, true));
        assert_eq!((gone, still), (Err(Errno::FAULT), true));
        assert_eq!(populate(|| Err(Errno::INVAL)), Ok(()));
    }
}
