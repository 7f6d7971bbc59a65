//! The broker: one owner of the device, leases for everybody else.
//!
//! A Dynamic Capacity Device has one mailbox. The broker drives it, and every
//! process that wants memory connects over a unix socket, gets the window's
//! descriptor and leases of it, and is asked for them back when capacity has
//! to go.
//!
//! - [`protocol`] is what travels, [`client`] the process's end; it never
//!   allocates, because it runs inside `malloc`.
//! - [`server`] is the loop, `session` the clients, `adding` the device's
//!   events, `report` the operator.
//! - `driving` has the device on a thread of its own and `fabric` the
//!   orchestrator, so that nobody waits for either; `helper` is their queues.
//! - [`policy`] says when more capacity is wanted and when there is too much,
//!   `keeping` sees to it; [`pressure`] is the host's own, on its DRAM.
//! - `recall` asks for memory back, `handover` gives it to the device,
//!   `refusal` says who kept what; `forced` is when nobody was asked.
//! - [`store`] and `ledger` are what outlives this process, `rejoin` how clients
//!   find back to the broker that comes after it.
//! - `fork` serves the children of clients that fork, `fork_client` is their end of it.
//! - `lease` and `outgoing` are the table of who holds which granule, without
//!   any I/O; `liveness` says when a lease ends, `scrub` wipes what it leaves,
//!   `warmer` has huge pages ready.
//! - `sharing` is capacity that other hosts have too, [`shared`] a process that
//!   maps some.
//! - [`status`] and [`map`] are what the broker tells about itself.

mod adding;
pub mod admin;
pub mod client;
pub mod client_page;
mod connection;
mod driving;
mod fabric;
mod forced;
mod fork;
mod fork_client;
mod handover;
mod helper;
mod keeping;
mod lease;
mod ledger;
pub mod listener;
mod liveness;
pub mod map;
mod mapping;
pub mod outcome;
mod outgoing;
pub mod peer;
pub mod policy;
pub mod pressure;
pub mod protocol;
mod ranges;
mod reason;
mod recall;
pub mod receipt;
mod refusal;
mod rejoin;
mod report;
mod scrub;
pub mod server;
mod session;
pub mod shared;
mod sharing;
mod socket;
pub mod status;
mod stop;
pub mod store;
mod warmer;

pub use client::{BrokerClient, ClientError, ConnectError, FromBroker, Welcome};
pub use client_page::{ClientPage, ClientPageMapping, ClientStats};
pub use fork::{ForkFamily, ServeFamily, guard};
pub use listener::{ListenError, Listener};
pub use outcome::{RecallOutcome, StallTimes};
pub use policy::{CapacityPolicy, PolicyError};
pub use protocol::{GRANULE, Ranges, RefusalReason, SharedCode, WindowRange};
pub use receipt::Receipt;
pub use scrub::Window;
pub use server::{Admit, Broker, BrokerConfig};
pub use shared::{SharedMapping, SharedOpenError};
pub use socket::SocketError;
pub use stop::Stop;
pub use store::{Notice, Store, StoreSocket};
