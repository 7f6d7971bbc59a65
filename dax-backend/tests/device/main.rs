//! The driver against a device, through registers: what a host owes a Dynamic Capacity Device.
//!
//! Each test is named after the rule it holds the driver to; docs/spec-map.md lists them.

#![forbid(unsafe_code)]

mod bench;

mod answering;
