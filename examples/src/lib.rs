//! What the example programs are made of. Nothing here knows where its memory is.

#![forbid(unsafe_code)]

pub mod store;
