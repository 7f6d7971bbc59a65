//! Register layouts: offsets and bit fields, no behaviour.

#![forbid(unsafe_code)]

pub mod capability;
pub mod device_status;
pub mod hdm_decoder;
pub mod mailbox;
