//! Pins: memory that a device reads or writes by itself stays where it is.
//!
//! A transfer that is under way does not follow a granule that moves. What is
//! pinned is refused by name when it is recalled, and a forked child does not
//! inherit it.

use core::time::Duration;

use crate::heap::Heap;
use crate::space::TryPin;

/// Why something could not be pinned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PinError {
    /// The range is empty.
    #[error("nothing to pin: the range has no bytes")]
    Empty,
    /// The range is not all allocated from this heap.
    #[error("{len} bytes at {addr:#x} are not all in use in this heap")]
    Foreign {
        /// Where it begins.
        addr: usize,
        /// Its bytes.
        len: usize,
    },
    /// A granule of the range has as many pins as are counted (65,535).
    #[error("there are 65535 pins on the same 2 MiB already")]
    TooMany,
}

/// Keeps memory where it is as long as it lives. Pins are counted for each
/// granule (2 MiB), so that ranges may overlap.
#[must_use = "the pin ends when this is dropped"]
pub struct PinGuard {
    heap: &'static Heap,
    addr: usize,
    len: usize,
}

impl Heap {
    /// Pins `len` bytes at `ptr`, which are allocated from this heap or one of
    /// its arenas. Waits for a move that is under way to end. To free what is
    /// pinned is no danger to others: its granules stay until the pin ends.
    ///
    /// # Errors
    /// See [`PinError`]; nothing is pinned then.
    pub fn pin(&'static self, ptr: *const u8, len: usize) -> Result<PinGuard, PinError> {
        let addr = ptr.addr();
        if len == 0 {
            return Err(PinError::Empty);
        }
        loop {
            match self.space().try_pin(addr, len) {
                TryPin::Pinned => {
                    return Ok(PinGuard {
                        heap: self,
                        addr,
                        len,
                    });
                }
                TryPin::Moving => std::thread::sleep(Duration::from_micros(200)),
                TryPin::Foreign => return Err(PinError::Foreign { addr, len }),
                TryPin::TooMany => return Err(PinError::TooMany),
            }
        }
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        self.heap.space().unpin(self.addr, self.len);
    }
}
