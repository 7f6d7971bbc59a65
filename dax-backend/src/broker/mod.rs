//! The broker: one owner of the device, leases for everybody else.
//!
//! A Dynamic Capacity Device has one mailbox. The broker drives it, and every
//! process that wants memory connects over a unix socket, gets the window's
//! descriptor and leases of it, and is asked for them back when capacity has
//! to go. [`protocol`] is what travels, [`client`] the process's end (it never
//! allocates: it runs inside `malloc`).

pub mod client;
pub mod client_page;
pub mod peer;
pub mod protocol;
mod socket;

pub use client::{BrokerClient, ClientError, ConnectError, FromBroker, Welcome};
pub use client_page::{ClientPage, ClientPageMapping, ClientStats};
pub use protocol::{GRANULE, Ranges, WindowRange};
pub use socket::SocketError;
