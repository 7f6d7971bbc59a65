//! Rebind: gives a granule another backing at the same address while threads
//! of the program, and the kernel for them, use it.
//!
//! 1. **Prepare** the new backing at an address that nobody else knows, with
//!    its pages present ([`Spare::prepare`]). Nearly all that can fail, fails
//!    here.
//! 2. **Take** the content away ([`Mover::take`]): a placeholder registered
//!    with userfaultfd is moved over an extent's granule, whose content stays
//!    readable through the alias mapping; from a granule in DRAM the pages are
//!    moved away and the empty mapping stays. From that instant every access
//!    waits in the kernel.
//!    Direct I/O that began before has pages in hand, and is waited for.
//! 3. **Copy** what is live. Granules that threads wait for go first.
//! 4. **Give** ([`Mover::give`]): the new backing is moved into place, in one
//!    step, and the waiting threads are woken.
//!
//! [`Mover::rebind`] is those four. Spilling uses them one by one, and leaves
//! a granule behind its placeholder while its content is in a file.
//!
//! Nothing is resolved page by page (no `UFFDIO_COPY`), so no step can meet
//! `EAGAIN`: a wait that cannot be ended yet stays in the monitor's table.
//! Neighbours share one placeholder, because putting it in place costs a round
//! trip to the monitor; where their new backings are contiguous the kernel
//! merges the mappings.
//!
//! # What the caller guarantees
//! The thread that owns the [`Mover`] has a descriptor table of its own
//! (`CLOSE_RANGE_UNSHARE`, close_range(2)), since a program that closes every
//! descriptor would take the userfaultfd along and turn placeholders into
//! zeroes, and it blocks all signals; the monitor inherits both. It never
//! touches a granule, nor allocates from one, and nobody forks while one is
//! taken.

mod copy;
mod error;
mod live;
mod mapping;
mod monitor;
mod mover;
mod placeholder;
mod reserve;
mod shelter;
mod smaps;
mod spare;
mod staging;
mod stall;
mod taken;
mod transfers;
mod uffd;
mod waiters;

/// What `waiters` counts in; `tests/models.rs` has loom's.
mod atomic {
    pub(super) use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
}

pub use copy::readable;
pub use error::{RebindError, StartError};
pub use live::LivePages;
pub use mapping::Change;
pub use monitor::Monitor;
pub(crate) use monitor::now;
pub use mover::Mover;
pub use shelter::{Aside, Mark, Shelter};
pub use spare::Spare;
pub use stall::StallHistogram;
pub use taken::Taken;
pub use uffd::{Uffd, UffdError};

/// Bytes of a granule, and its alignment.
pub const GRANULE: usize = 2 << 20;
const PAGE: usize = 4096;

/// How many granules one placeholder covers at most. More would amortize the
/// round trip to the monitor better, and let a thread wait for more copies.
pub const RUN: usize = 8;

/// What is behind a granule's addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Memory {
    /// A granule of an extent, by its address in the alias mapping: a shared
    /// mapping of the window that is handed out to nobody. (One of `/dev/mem`
    /// does not do, since mremap(2) duplicates no mapping without pages.)
    Extent(usize),
    /// Anonymous memory.
    Dram,
}

/// One granule of a run: from where to where, and what of it is live.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// What is behind it now.
    pub from: Memory,
    /// What shall be.
    pub to: Memory,
    /// The pages to copy.
    pub live: &'a LivePages,
}

/// What a rebind did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Moved {
    /// Live bytes copied.
    pub bytes_copied: u64,
    /// The longest that a granule was behind its placeholder (ns): no thread
    /// waited longer.
    pub longest_hold: u64,
    /// From the first check to the last wake (ns).
    pub duration: u64,
}
