//! The process-wide heap: where the allocator and the device's broker meet.
//!
//! `allocator` knows nothing of CXL and `dax-backend` nothing of heaps. This
//! crate joins them ([`BrokerSource`]) and owns the one heap of a process
//! ([`process`]), which the preloaded library and the C interface both serve.

mod broker_source;
mod leases;
pub mod process;
mod rejoin;

pub use broker_source::BrokerSource;
