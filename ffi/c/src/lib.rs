//! `libdcmalloc`: what `include/dcmalloc.h` declares, which is made from here.
//!
//! | file | has |
//! |---|---|
//! | [`arena`] | making and ending arenas |
//! | [`memory`] | allocations in them |
//! | [`pin`] | memory that stays where it is |
//! | [`shared`] | capacity that several hosts share, to be read |
//! | [`broker`] | connecting, giving back, receipts |
//! | [`ctl`] | one name for each number and setting |
//! | [`error`] | status codes and texts |
//!
//! Arenas are named by numbers and never by pointers, so one that has ended is
//! told from one that lives, and an address is looked up before it is freed.
#![allow(non_camel_case_types, reason = "types have the names that C knows")]

pub mod arena;
pub mod broker;
pub mod ctl;
pub mod error;
pub mod memory;
pub mod pin;
pub mod shared;

use allocator::Heap;
use dcmalloc::process;

use error::Error;

/// The heap, started; not from inside `malloc`.
fn heap() -> Result<&'static Heap, Error> {
    process::start()?;
    Ok(&process::HEAP)
}

/// Publishes the last statistics.
#[used]
#[unsafe(link_section = ".fini_array")]
static END: extern "C" fn() = end;

extern "C" fn end() {
    process::end();
}
