//! The broker over the software device, with real processes as clients.

mod admission;
mod capacity;
mod evacuations;
mod forks;
mod leases;
mod marks;
mod node;
mod pressure;
mod process;
mod recalls;
mod receipts;
mod restart;
mod rig;
mod sharing;
