//! Memory that is there already: a device-DAX node, a file, or a NUMA node's, all of it ours from
//! the start.
//!
//! To a broker it is a [`CapacityDevice`](crate::capacity::CapacityDevice) like any other, without
//! a mailbox behind it: the operator is its fabric manager, who takes memory out of use and puts it
//! back.

mod device;
mod file;
mod node;

pub use device::{FixedDevice, FixedOrchestrator, fixed};
pub use file::{FileError, MemoryFile, open};
pub use node::{NodeError, node_memory};
