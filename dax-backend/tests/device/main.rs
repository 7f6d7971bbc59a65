//! The driver against a device, through registers: what a host owes a Dynamic Capacity Device.
//!
//! Each test is named after the rule it holds the driver to; docs/spec-map.md lists them.

#![forbid(unsafe_code)]

mod bench;
mod course;
mod qemu;
mod wire;

mod answering;
mod crashes;
mod decoders;
mod fabric;
mod faults;
mod fm;
mod mailbox;
mod nonsense;
mod orchestrator;
mod recovery;
mod release;
mod staging;
mod stalls;
mod storm;
mod tags;
