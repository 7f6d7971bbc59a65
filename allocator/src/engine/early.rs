//! What jemalloc mapped for itself before it had hooks: what was allocated
//! before the heap started, in DRAM and outside the space.
#![forbid(unsafe_code)]

use core::ffi::c_void;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::control::exchange;

/// Bytes of it that are still there.
static BYTES: AtomicU64 = AtomicU64::new(0);
/// The GiB (counted from 1) that it lies in: two at most, because mappings are
/// made side by side. Of those jemalloc has a table of pages; of others it may
/// have none, and asking it about them would be a null pointer's end.
static REGIONS: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

fn region(addr: usize) -> usize {
    (addr >> 30) + 1
}

/// Remembers how much there is when the hooks are set.
pub(super) fn note(bytes: u64) {
    BYTES.store(bytes, Ordering::Relaxed);
}

/// Remembers where a part of it is.
pub(super) fn note_place(addr: usize) {
    for known in &REGIONS {
        let seen = known.compare_exchange(0, region(addr), Ordering::Relaxed, Ordering::Relaxed);
        if seen.is_ok() || seen == Err(region(addr)) {
            return;
        }
    }
}

/// Remembers that so much of it was given up.
pub(super) fn note_unmapped(bytes: u64) {
    let _ = BYTES.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |all| {
        Some(all.saturating_sub(bytes))
    });
}

/// Bytes of pages that hold something handed out before the heap started.
pub fn early_bytes() -> u64 {
    BYTES.load(Ordering::Relaxed)
}

/// Whether `addr` lies in a block that was handed out before the heap started.
#[cold]
pub fn is_early(addr: usize) -> bool {
    /// `experimental.utilization.batch_query` of jemalloc: free and all regions of
    /// the slab, and bytes of the extent that an address lies in; zeroes where
    /// there is none.
    #[repr(C)]
    #[derive(Default)]
    struct Utilization {
        free_regions: usize,
        regions: usize,
        bytes: usize,
    }
    let place = region(addr);
    if !REGIONS.iter().any(|r| r.load(Ordering::Relaxed) == place) {
        return false;
    }
    let mut found = Utilization::default();
    let addr = core::ptr::without_provenance::<c_void>(addr);
    exchange(
        c"experimental.utilization.batch_query",
        Some(&mut found),
        Some(addr),
    );
    found.bytes > 0
}
