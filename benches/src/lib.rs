//! Comparing dcmalloc with other allocators on the same programs in one run.
//!
//! The programs are plain C ([`programs`]) that know nothing of any allocator. A [`contender`] runs one of
//! them under its library; rounds are interleaved, so that what else happens on the machine hits every
//! contender alike; medians and their ratios are what is reported ([`report`]). Memory is what the
//! program's pages cost, each byte counted once ([`peak`]).

#![forbid(unsafe_code)]

pub mod contender;
pub mod peak;
pub mod programs;
pub mod report;
