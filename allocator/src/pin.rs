//! Pins: memory that a device reads or writes by itself stays where it is.
//!
//! A transfer that is under way does not follow a granule that moves. What is
//! pinned is refused by name when it is recalled, and a forked child finds
//! nothing where it is on an extent.

use core::time::Duration;
use std::time::Instant;

use rustix::mm::{Advice, madvise};

use crate::heap::Heap;
use crate::space::{GRANULE, MAX_PINS, PAGE, Pinned, TryPin};

/// How long a pin waits for a granule that is on the move.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks.
const LOOK: Duration = Duration::from_micros(200);

/// Why something could not be pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PinError {
    /// The range is empty.
    #[error("nothing to pin: the range has no bytes")]
    Empty,
    /// Some of the range is not in use in this heap: another allocator's, from
    /// before the heap started, freed, or lost.
    #[error("{len} bytes at {addr:#x} are not all in use in this heap")]
    Foreign {
        /// Where it begins.
        addr: usize,
        /// Its bytes.
        len: usize,
    },
    /// A granule of the range has as many pins as are counted.
    #[error("the 2 MiB around it have {MAX_PINS} pins already: drop some")]
    TooMany,
    /// A granule of the range is being moved, or is in the spill file and
    /// finds no memory to come back to.
    #[error("the 2 MiB at {addr:#x} did not come to rest within 10 s: try again")]
    Moving {
        /// The granule.
        addr: usize,
    },
}

/// Keeps memory where it is as long as it lives. Pins are counted for each
/// granule (2 MiB), so ranges may overlap.
#[must_use = "the pin ends when this is dropped"]
pub struct PinGuard {
    heap: &'static Heap,
    pinned: Pinned,
}

impl Heap {
    /// Pins `len` bytes at `ptr`, which are allocated from this heap or one of
    /// its arenas: until the guard is dropped they are not moved, spilled or
    /// given back. Waits for a move that is under way, and for what is in the
    /// spill file to come back, so it is not for signal handlers.
    ///
    /// Whether memory is in use is known by the page: an object that was freed
    /// among others that were not may be pinned, and does no harm. What is
    /// pinned and freed nevertheless stays with this process until the pin ends.
    ///
    /// The pins of a parent are not its child's: in the child a guard that was
    /// made before the fork pins nothing.
    ///
    /// # Errors
    /// See [`PinError`]; nothing is pinned then.
    pub fn pin(&'static self, ptr: *const u8, len: usize) -> Result<PinGuard, PinError> {
        let addr = ptr.addr();
        if len == 0 {
            return Err(PinError::Empty);
        }
        let until = Instant::now() + PATIENCE;
        loop {
            match self.space().try_pin(addr, len) {
                TryPin::Pinned(pinned) => return Ok(PinGuard { heap: self, pinned }),
                TryPin::Away(addr) if Instant::now() >= until => {
                    return Err(PinError::Moving { addr });
                }
                TryPin::Away(granule) => {
                    bring_back(addr.max(granule));
                    std::thread::sleep(LOOK);
                }
                TryPin::Foreign => return Err(PinError::Foreign { addr, len }),
                TryPin::TooMany => return Err(PinError::TooMany),
            }
        }
    }
}

/// Has the kernel touch the page at `addr`, as whoever waits for it does. It
/// may have been freed by now, and an access of our own would fault.
fn bring_back(addr: usize) {
    let page = (addr & !(PAGE - 1)) as *mut core::ffi::c_void;
    debug_assert!(page.addr() >= addr & !(GRANULE - 1));
    // SAFETY: advice that changes no content (MADV_POPULATE_READ, Linux 5.14).
    let _ = unsafe { madvise(page, PAGE, Advice::LinuxPopulateRead) };
}

impl core::fmt::Debug for PinGuard {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("PinGuard").field(&self.pinned).finish()
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        self.heap.space().unpin(self.pinned);
    }
}
