//! `libdcmalloc_preload.so`: the malloc family of a whole program.
//!
//! | file | exports |
//! |---|---|
//! | [`standard`] | malloc(3), posix_memalign(3) and their C23 and glibc kin |
//! | [`introspect`] | mallinfo2(3), malloc_trim(3), malloc_info(3) … answering for our heap |
//! | [`jemalloc`] | jemalloc's own names: a program linked against it must not mix two heaps |
//! | `dcmalloc_c` | what `dcmalloc.h` declares: a program linked to libdcmalloc.so gets it from here |
//!
//! The complete list is `symbols.txt`; a test compares it with `nm -D`. The
//! C++ operators are libstdc++'s own, which call `malloc`.
//!
//! *Life.* Calls before the constructor are served from DRAM. The constructor
//! starts the heap and connects it to the broker. Nothing here aborts, unwinds,
//! or writes to stderr unless `verbose:true`, `confirm_conf` or `stats_print`
//! asks, or memory is lost. dlclose(3) leaves the library in place
//! (`-z nodelete`): memory that it gave out outlives any handle.

pub mod introspect;
pub mod jemalloc;
pub mod standard;

// For the functions that it exports.
use dcmalloc_c as _;

use dcmalloc::process;

/// Starts the heap; before the constructors of the program and of libraries
/// that it brings along, which come after those of preloaded ones.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

/// Publishes the last statistics.
#[used]
#[unsafe(link_section = ".fini_array")]
static END: extern "C" fn() = end;

extern "C" fn start() {
    // Where it can't be started the engine serves everything from DRAM.
    let _ = standard::keep_errno(process::start);
    standard::started();
}

extern "C" fn end() {
    standard::keep_errno(process::end);
}
