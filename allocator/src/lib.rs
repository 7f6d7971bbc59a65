//! An allocator over extents: memory that can be taken back while it is in use.
//!
//! | word | means |
//! |---|---|
//! | granule | 2 MiB of the allocator's addresses: the unit of backing and of moving ([`space`]) |
//! | backing | what is behind a granule: nothing, an extent, DRAM |
//! | window | the one shared mapping that all extents lie in |
//! | lease | granules of the window that a source has lent ([`source`]) |
//! | recall | a lease asked back |
//! | tier | which backing an arena asks for: DRAM, or extents |
//! | arena | a part of the program's allocations with rules of its own ([`Arena`]) |
//! | engine | jemalloc: size classes, thread caches, fork locking ([`engine`]) |
//!
//! The crate knows nothing of CXL: it declares [`source::ExtentSource`], the
//! trait through which it gets capacity, and others implement it.

mod arena;
pub mod config;
pub mod engine;
mod evacuation;
pub mod fork;
mod global;
mod headroom;
pub mod heap;
mod outcome;
mod over_time;
mod pin;
pub mod placement;
mod service;
pub mod shared;
mod sharing;
mod sigbus;
pub mod source;
pub mod space;
mod spill;
pub mod stats;
pub mod sync;
pub mod tag;
mod thread;
mod word;

pub use allocator_api2;
pub use arena::{
    Arena, ArenaBuilder, ArenaError, ArenaStats, Lost, MAX_ARENAS, MAX_NAME, Pressure,
};
pub use config::{Config, ForkPolicy};
pub use global::DcMalloc;
pub use heap::Heap;
pub use pin::{PinError, PinGuard};
pub use placement::{OnExhausted, Placement};
pub use shared::{SharedError, SharedExtents};
pub use source::ExtentSource;
pub use spill::SpillState;
pub use stats::Stats;
pub use tag::{Tag, TagError};
