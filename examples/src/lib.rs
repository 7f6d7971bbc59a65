//! What the example programs are made of. Nothing here knows where its memory is.

#![forbid(unsafe_code)]

pub mod store;

/// The Rust of the pages, tried by rustdoc.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
mod readme {}
