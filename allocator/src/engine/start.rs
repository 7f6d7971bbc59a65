//! With which options jemalloc starts, which it does at its first call.
//!
//! `retain:false`: what is purged goes to the hooks at once, in pieces of any
//! size, and pieces from different calls merge. `cache_oblivious:false`: no
//! page of padding on each large allocation, so that 2 MiB ones fit a granule.
//! `metadata_thp:auto`: besides what it says, the stacks of thread caches are
//! then metadata too, and not taken from arena 0 and so perhaps from an
//! extent. `tcache_gc_incr_bytes`: the upkeep of thread caches every 256 KiB
//! instead of 64, which is 5 % of a pair of 768 bytes. `narenas`: two per
//! processor.
//!
//! `lg_extent_max_active_fit:0`: a freed run is not cut for a shorter one
//! before it has been purged. The engine takes any run that is long enough,
//! where the hooks take the tightest; cut so, soon none is left for 7 pages.
//! Two threads that hand 22 MiB of small objects to each other hold 12
//! granules, and 15 or 16 without.

use core::cell::UnsafeCell;
use core::ffi::c_char;

use super::MAX_ARENAS;

const TEXT: &[u8; 128] =
    b"retain:false,oversize_threshold:0,cache_oblivious:false,tcache_gc_incr_bytes:262144,metadata_thp:auto,lg_extent_max_active_fit:0";
const NARENAS: &[u8; 11] = b",narenas:04";

const LEN: usize = TEXT.len() + NARENAS.len() + 1;

#[repr(transparent)]
struct Options(UnsafeCell<[u8; LEN]>);

// SAFETY: written by `prepare` only, which runs before there are threads.
unsafe impl Sync for Options {}

static OPTIONS: Options = Options(UnsafeCell::new({
    let mut text = [0; LEN];
    let mut i = 0;
    while i < LEN - 1 {
        text[i] = if i < TEXT.len() {
            TEXT[i]
        } else {
            NARENAS[i - TEXT.len()]
        };
        i += 1;
    }
    text
}));

#[repr(transparent)]
struct Pointer(*const c_char);

// SAFETY: a constant address.
unsafe impl Sync for Pointer {}

/// The name under which jemalloc looks for its options.
#[unsafe(export_name = "_rjem_malloc_conf")]
#[used]
static POINTER: Pointer = Pointer(OPTIONS.0.get().cast());

/// Writes the number of arenas into the options. To be called before the
/// engine's first use, on the process's only thread.
pub fn prepare() {
    let cpus = rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count().max(1));
    let arenas = (2 * cpus as usize).min(MAX_ARENAS) as u8;
    let text = OPTIONS.0.get().cast::<u8>();
    // SAFETY: no other thread exists yet, and both places lie in the text.
    unsafe {
        *text.add(LEN - 3) = b'0' + arenas / 10;
        *text.add(LEN - 2) = b'0' + arenas % 10;
    }
}
