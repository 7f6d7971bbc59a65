//! Extents as memory of a NUMA node: the kernel's own, for any program.
//!
//! The DAX device over the window is the kernel's (`kmem`), which knows all of it as memory blocks
//! that are offline. [`NodeSurface`] is a client of the broker that leases all capacity there is: a
//! block that it holds whole is put online, and one that is asked back is taken offline, which moves
//! what is on it elsewhere, and returned. What is not accepted is never online.
#![forbid(unsafe_code)]

mod memory;
mod prepare;
mod surface;

pub use memory::{BlockError, MemoryBlocks};
pub use prepare::{Cleared, WholeBlocks};
pub use surface::{Given, NodeSurface};
