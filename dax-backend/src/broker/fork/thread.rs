//! The thread that serves one family: it ends the waits of all its members.
//!
//! One thread a family, so that no client waits for another's copies, nor for
//! a device, and none can hold up more than its own.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SendFlags;

use super::family::{Family, MemberId, push_run};
use super::uffd::{Event, Filled, Uffd};
use crate::broker::lease::{ClientId, push_merged};
use crate::broker::mapping::Mapping;
use crate::broker::protocol::{FORK_LAST, GRANULE, Kind, Message, SharedRun, WindowRange};
use crate::broker::socket::{Descriptors, SocketError, receive_message, send_message};

/// Between attempts at what could not be done at once.
const RETRY: Duration = Duration::from_millis(1);
/// The longest between two looks whether a member lives.
const PROBE_MAX: Duration = Duration::from_millis(250);
/// Events read of one member before the others get their turn.
const BURST: usize = 64;

/// What the broker wants of a family.
#[derive(Debug)]
pub(super) enum Order {
    /// Whether what the root shares is its own to share.
    Shared(bool),
    /// The root can't be told to map these again.
    PutBack(Vec<SharedRun>),
    /// Everybody is to have copies of these.
    Evict { id: u64, ranges: Vec<WindowRange> },
}

/// What a family has for the broker.
#[derive(Debug)]
pub(super) enum News {
    /// The root makes originals of these.
    Share(Vec<WindowRange>),
    /// Only the root needs these now.
    Restore(Vec<SharedRun>),
    /// The root has its own copies.
    Filled(Vec<SharedRun>),
    /// Nobody needs these.
    Free(Vec<WindowRange>),
    /// An eviction is done.
    Evicted { id: u64, bytes: u64 },
    /// The members are all gone.
    Ended,
}

/// Where news go, and what makes the broker look.
#[derive(Debug, Clone)]
pub(super) struct Desk {
    pub(super) client: ClientId,
    pub(super) news: Sender<(ClientId, News)>,
    pub(super) bell: Arc<OwnedFd>,
}

impl Desk {
    fn tell(&self, news: News) {
        // A broker that has gone needs no news.
        let _ = self.news.send((self.client, news));
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

struct Member {
    uffd: Uffd,
    born: Instant,
    probe: Instant,
}

struct Eviction {
    id: u64,
    bytes: u64,
    originals: Vec<u64>,
}

/// One family being served.
pub(super) struct Server {
    desk: Desk,
    mapping: Arc<Mapping>,
    /// The root speaks here around a fork; `None`: it has stopped.
    line: Option<OwnedFd>,
    orders: Receiver<Order>,
    bell: Arc<OwnedFd>,
    family: Family,
    members: BTreeMap<MemberId, Member>,
    /// Faults to serve, in order.
    waits: Vec<(MemberId, u64)>,
    evictions: Vec<Eviction>,
    /// A fork is near: the root is told nothing, and places that it has
    /// covered may be unknown still.
    forking: bool,
    proposed: Vec<SharedRun>,
    /// Granules that the root was told to map again.
    restored: u64,
    filled: Vec<SharedRun>,
    free: Vec<WindowRange>,
}

impl Server {
    pub(super) fn new(
        desk: Desk,
        mapping: Arc<Mapping>,
        line: OwnedFd,
        root: Uffd,
        orders: Receiver<Order>,
        bell: Arc<OwnedFd>,
    ) -> Self {
        let mut server = Self {
            desk,
            mapping,
            line: Some(line),
            orders,
            bell,
            family: Family::new(),
            members: BTreeMap::new(),
            waits: Vec::new(),
            evictions: Vec::new(),
            forking: false,
            proposed: Vec::new(),
            restored: 0,
            filled: Vec::new(),
            free: Vec::new(),
        };
        server.join(MemberId::ROOT, root);
        server.answer(true);
        server
    }

    /// Serves until nobody is left.
    pub(super) fn run(mut self) {
        while !self.family.is_extinct() {
            let Ok(ready) = self.wait() else {
                break;
            };
            self.obey();
            if ready.line {
                self.listen();
            }
            for id in ready.members {
                self.hear(id);
            }
            self.serve();
            self.evict();
            self.bury_dead();
            self.tell();
        }
        self.desk.tell(News::Ended);
    }

    fn wait(&self) -> Result<Ready, Errno> {
        let mut fds = vec![PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN)];
        fds.extend(
            self.line
                .iter()
                .map(|line| PollFd::new(line, PollFlags::IN)),
        );
        let first = fds.len();
        let members = self.members.values();
        fds.extend(members.map(|m| PollFd::from_borrowed_fd(m.uffd.as_fd(), PollFlags::IN)));
        let timeout = if self.waits.is_empty() && self.evictions.is_empty() {
            let needy = self.members.iter().filter(|(id, _)| self.is_probed(**id));
            let next = needy.map(|(_, member)| member.probe).min();
            next.map(|at| at.saturating_duration_since(Instant::now()))
        } else {
            Some(RETRY)
        };
        let timeout = timeout.map(|wait| Timespec {
            tv_sec: wait.as_secs() as i64,
            tv_nsec: i64::from(wait.subsec_nanos()),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        let fired = |fd: &PollFd<'_>| !fd.revents().is_empty();
        Ok(Ready {
            line: first > 1 && fired(&fds[1]),
            members: self
                .members
                .keys()
                .zip(&fds[first..])
                .filter_map(|(id, fd)| fired(fd).then_some(*id))
                .collect(),
        })
    }

    /// Whether it matters that a member is gone. The root says so itself, by
    /// its line, while it needs nothing.
    fn is_probed(&self, id: MemberId) -> bool {
        self.family.needs_any(id) || (id == MemberId::ROOT && self.line.is_none())
    }

    fn join(&mut self, id: MemberId, uffd: Uffd) {
        let now = Instant::now();
        self.members.insert(
            id,
            Member {
                uffd,
                born: now,
                probe: now + RETRY,
            },
        );
    }

    /// What the broker wants.
    fn obey(&mut self) {
        let _ = rustix::io::read(&self.bell, &mut [0u8; 8]);
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Shared(ours) => {
                    let runs = std::mem::take(&mut self.proposed);
                    if ours {
                        self.family.share(&runs);
                    }
                    self.answer(ours);
                }
                Order::PutBack(runs) => {
                    self.family.put_back(&runs);
                    let places = runs
                        .iter()
                        .flat_map(|run| (run.addr..run.addr + run.len).step_by(GRANULE as usize));
                    // Somebody may have been waiting, unheard.
                    self.waits.extend(places.map(|at| (MemberId::ROOT, at)));
                }
                Order::Evict { id, ranges } => {
                    let originals = ranges
                        .iter()
                        .flat_map(|range| (range.offset..range.end()).step_by(GRANULE as usize));
                    self.evictions.push(Eviction {
                        id,
                        bytes: ranges.iter().map(|range| range.len).sum(),
                        originals: originals.collect(),
                    });
                }
            }
        }
    }

    /// What the root says around a fork.
    fn listen(&mut self) {
        while let Some(line) = &self.line {
            let message = match receive_message(line.as_fd(), &mut Descriptors::default()) {
                Ok(message) => message,
                Err(SocketError::System(Errno::AGAIN)) => return,
                Err(_) => {
                    self.line = None;
                    return;
                }
            };
            match message.kind() {
                Some(Kind::ForkBegin) => {
                    self.forking = true;
                    self.answer(true);
                }
                Some(Kind::ForkShare) if self.forking => {
                    let runs = message.shared_runs();
                    let whole = |run: &SharedRun| {
                        run.len > 0
                            && [run.addr, run.offset, run.len]
                                .iter()
                                .all(|n| n.is_multiple_of(GRANULE))
                            && run.end() <= self.mapping.len()
                    };
                    let sane = runs.len() > 0 && runs.clone().all(|run| whole(&run));
                    self.proposed.extend(runs);
                    if !sane {
                        self.proposed.clear();
                        self.answer(false);
                    } else if message.flags() & FORK_LAST != 0 {
                        let ranges = self.proposed.iter().map(SharedRun::window);
                        self.desk.tell(News::Share(ranges.collect()));
                    }
                }
                Some(Kind::ForkEnd) => self.forking = false,
                _ => self.line = None,
            }
        }
    }

    fn answer(&mut self, yes: bool) {
        let message = Message::new(Kind::ForkAnswer)
            .with_arg(0, u64::from(!yes))
            .with_arg(1, self.restored);
        if let Some(line) = &self.line
            && send_message(line.as_fd(), &message, &[], SendFlags::DONTWAIT).is_err()
        {
            self.line = None;
        }
    }

    /// What a member did.
    fn hear(&mut self, id: MemberId) {
        for _ in 0..BURST {
            let Some(member) = self.members.get(&id) else {
                return;
            };
            match member.uffd.next() {
                Ok(Some(Event::Fault(addr))) => self.waits.push((id, addr)),
                Ok(Some(Event::Fork(uffd))) => {
                    let child = self.family.born(id);
                    self.join(child, uffd);
                }
                Ok(None) => {}
                Err(_) => return,
            }
        }
    }

    fn serve(&mut self) {
        let waits = std::mem::take(&mut self.waits);
        for (id, addr) in waits {
            if self.fill(id, addr) == Filled::Later {
                self.waits.push((id, addr));
            }
        }
    }

    /// Ends the wait of a member for the page at `addr`.
    fn fill(&mut self, id: MemberId, addr: u64) -> Filled {
        let place = addr - addr % GRANULE;
        let Some(member) = self.members.get(&id) else {
            return Filled::Gone;
        };
        let Some(original) = self.family.original(id, place) else {
            return if id == MemberId::ROOT && self.forking {
                Filled::Later
            } else if id == MemberId::ROOT && self.family.is_restored(place) {
                // The root ends the wait itself.
                Filled::Done
            } else if self.family.is_lost(id, place) {
                member.uffd.poison(place);
                Filled::Done
            } else {
                member.uffd.zero(addr)
            };
        };
        let result = member.uffd.fill(place, self.mapping.address(original));
        match result {
            Filled::Later => return result,
            Filled::Gone => self.bury(id),
            Filled::Unreadable => member.uffd.poison(place),
            Filled::Done => {}
        }
        if result != Filled::Gone {
            if id == MemberId::ROOT {
                push_run(&mut self.filled, place, original);
            }
            let free = self.family.filled(id, place);
            self.now_free(free);
        }
        result
    }

    /// Copies to everybody what is wanted back.
    fn evict(&mut self) {
        for mut eviction in std::mem::take(&mut self.evictions) {
            eviction.originals.retain(|original| {
                let holders = self.family.holders(*original);
                let mut left = false;
                for (id, place) in holders {
                    left |= self.fill(id, place) == Filled::Later;
                }
                left
            });
            if eviction.originals.is_empty() {
                self.tell();
                self.desk.tell(News::Evicted {
                    id: eviction.id,
                    bytes: eviction.bytes,
                });
            } else {
                self.evictions.push(eviction);
            }
        }
    }

    fn bury_dead(&mut self) {
        let now = Instant::now();
        let due: Vec<MemberId> = self
            .members
            .iter()
            .filter(|(id, member)| member.probe <= now && self.is_probed(**id))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let Some(member) = self.members.get_mut(&id) else {
                continue;
            };
            if member.uffd.is_gone() {
                self.bury(id);
            } else {
                let age = now.saturating_duration_since(member.born);
                member.probe = now + (age / 8).clamp(RETRY, PROBE_MAX);
            }
        }
        // Who needs nothing is an ordinary process from here on: pages that it
        // has dropped read as zeroes by themselves.
        let idle: Vec<MemberId> = self
            .members
            .keys()
            .filter(|id| **id != MemberId::ROOT && !self.family.needs_any(**id))
            .copied()
            .collect();
        idle.into_iter().for_each(|id| self.bury(id));
    }

    fn bury(&mut self, id: MemberId) {
        self.members.remove(&id);
        let free = self.family.died(id);
        self.now_free(free);
        self.waits.retain(|(member, _)| *member != id);
    }

    fn now_free(&mut self, originals: impl IntoIterator<Item = u64>) {
        for offset in originals {
            let len = GRANULE;
            push_merged(&mut self.free, WindowRange { offset, len });
        }
    }

    /// Says what has changed.
    fn tell(&mut self) {
        if !self.filled.is_empty() {
            self.desk
                .tell(News::Filled(std::mem::take(&mut self.filled)));
        }
        if !self.free.is_empty() {
            self.desk.tell(News::Free(std::mem::take(&mut self.free)));
        }
        if self.forking || self.line.is_none() {
            return;
        }
        let runs = self.family.take_restorable();
        if !runs.is_empty() {
            self.restored += runs.iter().map(|run| run.len / GRANULE).sum::<u64>();
            self.desk.tell(News::Restore(runs));
        }
    }
}

struct Ready {
    line: bool,
    members: Vec<MemberId>,
}
