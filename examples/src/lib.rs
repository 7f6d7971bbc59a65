//! What the example programs are made of. Nothing here knows where its memory is.

#![deny(unsafe_code)]

pub mod draw;
#[expect(unsafe_code, reason = "SQLite calls it by C's rules")]
pub mod page_cache;
#[expect(unsafe_code, reason = "io_uring reads into frames")]
pub mod pool;
pub mod store;

/// The Rust of the pages, tried by rustdoc.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
mod readme {}
