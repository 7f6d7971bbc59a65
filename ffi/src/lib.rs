//! dcmalloc for Rust programs: a global allocator, arenas, and the broker that
//! lends them extents.
//!
//! A program whose cache is an arena, and goes when capacity is asked back:
//!
//! ```
//! use dcmalloc::{Arena, DcMalloc, allocator_api2::vec::Vec};
//! #[global_allocator]
//! static HEAP: DcMalloc = DcMalloc::new();
//! static CACHE: std::sync::Mutex<Option<Vec<u8, Arena>>> = std::sync::Mutex::new(None);
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     dcmalloc::attach(&HEAP).unwrap_or_else(|error| eprintln!("all in DRAM: {error}"));
//!     let arena = HEAP.arena("cache").on_pressure(|_| *CACHE.lock().unwrap() = None).build()?;
//!     CACHE.lock().unwrap().insert(Vec::new_in(arena)).resize(64 << 20, 7);
//!     Ok(println!("{:?}", HEAP.stats().usage))
//! }
//! ```
//!
//! `allocator` knows nothing of CXL and `dax-backend` nothing of heaps. This
//! crate joins them ([`BrokerSource`]) and owns the one heap of a process
//! ([`process`]), which the preloaded library and the C interface both serve.

mod broker_source;
mod copies;
mod leases;
pub mod process;
mod rejoin;
pub mod settings;

pub use allocator::{
    Arena, ArenaBuilder, ArenaError, ArenaStats, Config, DcMalloc, ForkPolicy, Heap, Lost,
    OnExhausted, PinError, PinGuard, Placement, Pressure, SharedError, SharedExtents, Stats, Tag,
    TagError, allocator_api2,
};
pub use broker_source::{BrokerSource, SourceError};
pub use process::attach;
