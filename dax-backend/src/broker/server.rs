//! The broker's loop: one thread for all sockets, which waits for nobody.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use uuid::Uuid;

use super::adding::{Outcome, PendingAdd};
use super::connection::{Connection, ConnectionId, Phase};
use super::driving::DeviceThread;
use super::fabric::FabricThread;
use super::forced::PendingForce;
use super::fork::{ForkFamily, Forks, ServeFamily};
use super::handover::{Leaving, Untaken};
use super::lease::{ClientId, LeaseTable, Synced};
use super::ledger::Ledger;
use super::listener::Listener;
use super::policy::{CapacityPolicy, Policy};
use super::pressure::Pressure;
use super::protocol::GRANULE;
use super::recall::Recalls;
use super::report::Runs;
use super::scrub::Window;
use super::session::Client;
use super::sharing::Readers;
use super::status::BrokerCounters;
use super::stop::Stop;
use super::store::Store;
use super::warmer::Warmer;
use crate::address::DpaRange;
use crate::capacity::CapacityDevice;
use crate::orchestrator::Orchestrator;

/// How long wiping may go on before sockets are looked at again.
const WIPE_BUDGET: Duration = Duration::from_millis(2);
/// How long a connection may take to say hello.
const HELLO_PATIENCE: Duration = Duration::from_secs(5);
/// At least so often what has no time of its own is looked at.
const HOUSEKEEPING: Duration = Duration::from_millis(250);
/// How long nobody is accepted after descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What the keeper calls the ledger.
const LEDGER: &str = "ledger";

/// Which users may take leases. But for the last, root and the broker's own user always may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admit {
    /// Nobody else.
    Owner,
    /// Whoever knows the id of this run: programs that change their user.
    Run(Uuid),
    /// Everybody: a system's broker.
    Anyone,
    /// Only a thread of the broker's own process, which makes something else of the capacity.
    Itself,
}

/// How a broker behaves.
#[derive(Debug, Clone, Copy)]
pub struct BrokerConfig {
    /// Who may take leases.
    pub admit: Admit,
    /// How long clients may take when the device asks for memory back.
    pub recall_deadline: Duration,
    /// Free memory to keep ready as huge pages, in bytes; 0: none.
    pub warm_reserve: u64,
    /// How much free capacity to keep; `None`: what there is.
    pub policy: Option<CapacityPolicy>,
    /// How many brokers over the same device have died before this one.
    pub restarts: u64,
    /// What serves the children of clients that fork.
    pub serve_family: ServeFamily,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            admit: Admit::Owner,
            recall_deadline: Duration::from_secs(2),
            warm_reserve: 128 << 20,
            policy: None,
            restarts: 0,
            serve_family: ForkFamily::serve_on_thread,
        }
    }
}

/// The owner of a device and of all leases of it.
pub struct Broker {
    pub(super) device: DeviceThread,
    pub(super) fabric: Option<FabricThread>,
    pub(super) window: Arc<Window>,
    pub(super) config: BrokerConfig,
    pub(super) table: LeaseTable,
    pub(super) connections: BTreeMap<ConnectionId, Connection>,
    pub(super) clients: BTreeMap<ClientId, Client>,
    pub(super) readers: Readers,
    pub(super) runs: Runs,
    pub(super) recalls: Recalls,
    pub(super) forks: Forks,
    pub(super) adds: Vec<PendingAdd>,
    pub(super) forces: Vec<PendingForce>,
    pub(super) policy: Policy,
    pub(super) pressure: Pressure,
    /// Bytes that clients asked for and did not get, since the policy looked.
    pub(super) short: u64,
    /// When the policy looks again.
    pub(super) look_again: Instant,
    /// What became of offers that the orchestrator has not told of yet.
    pub(super) outcomes: Vec<Outcome>,
    /// With the device at the moment.
    pub(super) leaving: Option<Leaving>,
    pub(super) untaken: Untaken,
    in_use_known: bool,
    /// Accepted but in no granule, and wanted back.
    pub(super) stranded: Vec<DpaRange>,
    pub(super) counters: BrokerCounters,
    pub(super) started: Instant,
    pub(super) device_error: Option<String>,
    pub(super) userfaultfd: Option<OwnedFd>,
    pub(super) store: Store,
    next_connection: u64,
    accept_after: Instant,
    warmer: Option<Warmer>,
    /// Whether huge pages can be had; tried again when capacity changes.
    warming: bool,
}

impl Broker {
    /// A broker over `device`, whose memory `window` shows from the lowest DC
    /// region's base on. Capacity that the device lists as accepted is adopted.
    ///
    /// # Errors
    /// No threads or descriptors left.
    pub fn new(
        device: Box<dyn CapacityDevice>,
        orchestrator: Option<Box<dyn Orchestrator>>,
        window: Window,
        config: BrokerConfig,
    ) -> io::Result<Self> {
        Self::with_store(device, orchestrator, window, config, Store::none())
    }

    /// As [`Self::new`], with what an earlier broker over the same device left
    /// in `store`: its leases go on, and its clients find back.
    ///
    /// # Errors
    /// No threads, descriptors or memory left.
    pub fn with_store(
        device: Box<dyn CapacityDevice>,
        orchestrator: Option<Box<dyn Orchestrator>>,
        window: Window,
        config: BrokerConfig,
        mut store: Store,
    ) -> io::Result<Self> {
        let window = Arc::new(window);
        let device = DeviceThread::start(device, window.clone())?;
        let fabric = orchestrator.map(FabricThread::start).transpose()?;
        let now = Instant::now();
        let mut span = device.span();
        span.len = span.len.min(window.len());
        let warmer = (config.warm_reserve > 0)
            .then(|| Warmer::start(window.mapping().clone()).ok())
            .flatten();
        let slots = (span.len / GRANULE) as usize;
        let earlier = store.take(LEDGER);
        let ledger = match earlier.and_then(|fd| Ledger::open(fd, slots, span.start.0)) {
            Some(ledger) => ledger,
            None => {
                let ledger = Ledger::new(slots, span.start.0)?;
                store.keep(LEDGER, ledger.fd());
                ledger
            }
        };
        let table = LeaseTable::new(span, device.snapshot.block_size, ledger);
        let mut broker = Self {
            device,
            fabric,
            window,
            config,
            table,
            connections: BTreeMap::new(),
            clients: BTreeMap::new(),
            readers: Readers::default(),
            runs: Runs::default(),
            recalls: Recalls::default(),
            forks: Forks::default(),
            adds: Vec::new(),
            forces: Vec::new(),
            policy: Policy::new(config.policy),
            pressure: Pressure::of_host(now),
            short: 0,
            look_again: now,
            outcomes: Vec::new(),
            leaving: None,
            untaken: Untaken::default(),
            in_use_known: config.admit != Admit::Itself,
            stranded: Vec::new(),
            counters: BrokerCounters::default(),
            started: now,
            device_error: None,
            // Root's right, lent to clients that have none: see userfaultfd(2).
            userfaultfd: rustix::fs::open(
                "/dev/userfaultfd",
                OFlags::RDWR | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .ok(),
            store,
            next_connection: 1,
            accept_after: now,
            warmer,
            warming: true,
        };
        broker.adopt_clients(now);
        broker.adopt_readers(now);
        broker.adopt_families();
        let synced = broker.sync_capacity();
        if synced.has_lost() {
            broker.taken_by_force(&[], &synced, now);
        }
        // What an earlier broker had marked and not given to the device yet may be free.
        broker.claim_for_recall();
        Ok(broker)
    }

    /// Tells the keeper that programs can connect.
    pub fn ready(&self) {
        if let Some(keeper) = self.store.keeper() {
            let _ = keeper.ready();
        }
    }

    /// Serves `listener` until `stop` says so.
    ///
    /// # Errors
    /// Only what makes serving impossible: poll(2) itself failing.
    pub fn serve(&mut self, listener: &Listener, stop: &Stop) -> Result<(), Errno> {
        while !stop.reached(self.clients.is_empty() && self.forks.is_empty()) {
            self.turn(listener, stop)?;
        }
        Ok(())
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self, listener: &Listener, stop: &Stop) -> Result<(), Errno> {
        let ready = self.wait(listener, stop)?;
        let now = Instant::now();
        self.hear_families(now);
        if ready.listener {
            self.accept(listener, now);
        }
        if ready.pressure.contains(PollFlags::PRI) {
            self.under_pressure(now);
        } else if !ready.pressure.is_empty() {
            self.pressure_gone();
        }
        for id in ready.dead {
            if let Some(client) = self.clients.get_mut(&id) {
                client.process_died(now);
            }
        }
        for id in ready.connections {
            self.converse(id, now);
        }
        self.take_answers(now);
        self.take_reports(now);
        self.wipe();
        self.grant_leases();
        self.keep_marks(now);
        self.probe_clients(now);
        self.probe_readers(now, false);
        self.advance_recalls(now);
        self.expire_adds(now);
        self.expire_forces(now);
        self.drop_silent_connections(now);
        self.warm();
        let starving = self.clients.values().any(Client::is_starving);
        self.device.set_starving(starving);
        Ok(())
    }

    fn wait(&self, listener: &Listener, stop: &Stop) -> Result<Ready, Errno> {
        let accepting = if Instant::now() < self.accept_after {
            PollFlags::empty()
        } else {
            PollFlags::IN
        };
        let mut fds = vec![
            PollFd::new(listener, accepting),
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(&self.device, PollFlags::IN),
        ];
        if let Some(fabric) = &self.fabric {
            fds.push(PollFd::new(fabric, PollFlags::IN));
        }
        fds.extend(self.forks.poll_fds());
        if let Some(warmer) = &self.warmer {
            fds.push(PollFd::new(warmer, PollFlags::IN));
        }
        let pressure = self.pressure.fd().map(|fd| {
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::PRI));
            fds.len() - 1
        });
        let first = fds.len();
        for connection in self.connections.values() {
            let mut interest = PollFlags::IN;
            if connection.is_blocked() {
                interest |= PollFlags::OUT;
            }
            fds.push(PollFd::from_borrowed_fd(connection.fd(), interest));
        }
        let watched = || {
            let clients = self.clients.iter();
            clients.filter_map(|(id, client)| client.pidfd().map(|fd| (*id, fd)))
        };
        fds.extend(watched().map(|(_, fd)| PollFd::from_borrowed_fd(fd, PollFlags::IN)));

        let wait = self.next_wake().saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let fired = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let (sockets, pidfds) = fds[first..].split_at(self.connections.len());
        Ok(Ready {
            listener: fired(&fds[0]),
            pressure: pressure.map_or(PollFlags::empty(), |at| fds[at].revents()),
            connections: self
                .connections
                .keys()
                .zip(sockets)
                .filter_map(|(id, fd)| fired(fd).then_some(*id))
                .collect(),
            dead: watched()
                .zip(pidfds)
                .filter_map(|((id, _), fd)| fired(fd).then_some(id))
                .collect(),
        })
    }

    /// When there is something to do even if no socket says anything.
    fn next_wake(&self) -> Instant {
        let now = Instant::now();
        if self.table.next_dirty().is_some() {
            return now;
        }
        let mut wake = now + HOUSEKEEPING;
        wake = wake.min(self.recalls.deadline().unwrap_or(wake));
        wake = wake.min(self.readers.due().unwrap_or(wake));
        for client in self.clients.values() {
            wake = wake.min(client.probe_due().unwrap_or(wake));
        }
        wake
    }

    fn accept(&mut self, listener: &Listener, now: Instant) {
        loop {
            match listener.accept() {
                Ok(socket) => {
                    let granules = self.table.slots.len();
                    if let Ok(connection) = Connection::new(socket, granules, now) {
                        let id = ConnectionId(self.next_connection);
                        self.next_connection += 1;
                        self.connections.insert(id, connection);
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                // No descriptor or memory left: those who wait keep waiting.
                Err(_) => {
                    self.accept_after = now + ACCEPT_PAUSE;
                    return;
                }
            }
        }
    }

    fn drop_silent_connections(&mut self, now: Instant) {
        self.connections
            .retain(|_, connection| match connection.phase {
                Phase::New { since } => now.saturating_duration_since(since) < HELLO_PATIENCE,
                _ => true,
            });
    }

    /// Whether the table says what is in use. What makes something else of the capacity may have
    /// left it in use when an earlier broker ended, and nothing is free before it has its lease.
    pub(super) fn knows_use(&mut self) -> bool {
        let answered = |client: &Client| client.leased > 0 || client.is_starving();
        self.in_use_known |= self.clients.values().any(answered);
        self.in_use_known
    }

    /// Takes over what the device says is accepted.
    pub(super) fn sync_capacity(&mut self) -> Synced {
        let device = &self.device.snapshot;
        let synced = self.table.sync(
            &device.accepted,
            |range| device.sanitizes(range),
            |range| device.shares(range),
        );
        if synced.gained > 0 {
            self.warming = true;
        }
        synced
    }

    /// Wipes free memory of whoever had it before, for a little while.
    pub(super) fn wipe(&mut self) {
        let until = Instant::now() + WIPE_BUDGET;
        let mut left = WIPE_BUDGET;
        while !left.is_zero()
            && let Some((range, huge)) = self.table.next_dirty()
        {
            let wiped = self.window.wipe(range, huge, left);
            self.table.zeroed(wiped.zeroed);
            self.counters.wiped_bytes += wiped.zeroed.len;
            if let Some(offset) = wiped.broken {
                self.table.broke(offset);
            }
            left = until.saturating_duration_since(Instant::now());
        }
    }

    /// Keeps some free memory ready as huge pages.
    fn warm(&mut self) {
        let Some(warmer) = &mut self.warmer else {
            return;
        };
        if let Some(warmed) = warmer.finished() {
            if warmed.huge {
                self.table.warmed(warmed.offset);
            } else {
                self.warming = false;
            }
        }
        let reserve = (self.config.warm_reserve / GRANULE) as usize;
        if self.warming
            && warmer.is_idle()
            && let Some(granule) = self.table.next_cold(reserve)
        {
            warmer.order(granule.offset);
        }
    }
}

struct Ready {
    listener: bool,
    pressure: PollFlags,
    connections: Vec<ConnectionId>,
    dead: Vec<ClientId>,
}
