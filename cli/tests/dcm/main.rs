//! `dcm` as people call it.
//!
//! Most tests need no library that works, only one that loads: the C library's
//! own mathematics stands in for it. Where a program must talk to the broker,
//! this test binary is the program ([`client`]).

mod activation;
mod call;
mod client;
mod doctor;
mod generate;
mod live;
mod orders;
mod run;
mod top;
mod usage;
