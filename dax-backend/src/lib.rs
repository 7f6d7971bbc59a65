//! A user-space driver for CXL Dynamic Capacity Devices, and the broker that shares one.
//!
//! The path of one extent, from the fabric manager's offer until it is given back:
//!
//! 1. The device writes an Add Capacity record into its event log ([`event_record`]).
//! 2. The driver reads it through the [`mailbox`], stages it and clears it; [`staging`] waits
//!    until the More group is complete.
//! 3. The group is judged extent by extent and answered with one Add Dynamic Capacity Response.
//! 4. The device confirms: [`device::DcDevice`] reports a [`capacity::DeviceEvent::Accepted`],
//!    and the memory is there, at the host address that its decoder ([`hdm`]) gives it.
//! 5. The device asks for it back, or nobody needs it: [`capacity::CapacityDevice::release`].
//!
//! All of this goes through [`mmio::Mmio`], registers at their exact width. [`model`] is a whole
//! device below that seam, with its fabric manager's side.

pub mod address;
pub mod blocks;
pub mod broker;
pub mod capacity;
pub mod cmd;
pub mod device;
pub mod error;
pub mod event_record;
pub mod extent;
pub mod extent_list;
pub mod fixed;
pub mod hdm;
pub mod journal;
pub mod mailbox;
pub mod mmio;
pub mod model;
pub mod orchestrator;
pub mod pci;
pub mod region;
pub mod regs;
pub mod staging;
pub mod window;
