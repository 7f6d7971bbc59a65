//! The fork server of one family: it ends the waits of all its members.
//!
//! One for each family, so that no client waits for another's copies, nor for
//! a device, and none can hold up more than its own.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::ForkFamily;
use super::family::{Family, MemberId, push_run};
use super::outbox::Outbox;
use super::uffd::{Event, Filled, Uffd};
use crate::broker::lease::push_merged;
use crate::broker::mapping::Mapping;
use crate::broker::protocol::{
    FORK_LAST, GRANULE, Kind, MAX_RANGES, MAX_RUNS, Message, SharedRun, WindowRange,
};
use crate::broker::socket::{Descriptors, SocketError, receive_message};

/// Between attempts at what could not be done at once.
const RETRY: Duration = Duration::from_millis(1);
/// The longest between two looks whether a member lives.
const PROBE_MAX: Duration = Duration::from_millis(250);
/// Events read of one member before the others get their turn.
const BURST: usize = 64;

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

/// A fork of the root that has begun and not ended.
#[derive(Default)]
struct Fork {
    /// What the root says that it shares.
    runs: Vec<SharedRun>,
    /// What the broker has not answered yet.
    unanswered: BTreeSet<u64>,
    refused: bool,
    /// The books have it all.
    settled: bool,
}

/// One family being served.
pub(super) struct Server {
    mapping: Mapping,
    /// The broker; `None`: there is none any more.
    desk: Option<Outbox>,
    /// The root speaks here around a fork; `None`: it has stopped.
    line: Option<Outbox>,
    family: Family,
    members: BTreeMap<MemberId, Member>,
    /// Faults to serve, in order.
    waits: Vec<(MemberId, u64)>,
    /// What the broker is about to ask for.
    asked: Vec<WindowRange>,
    evictions: Vec<Eviction>,
    fork: Option<Fork>,
    /// Messages to the broker that it answers.
    said: u64,
    filled: Vec<SharedRun>,
    free: Vec<WindowRange>,
}

impl Server {
    pub(super) fn new(given: ForkFamily) -> Result<Self, Errno> {
        let mapping = Mapping::new(given.window.as_fd(), given.base, given.len)?;
        let root = Uffd::new(given.userfaultfd)?;
        let mut server = Self {
            mapping,
            desk: Some(Outbox::new(given.desk)),
            line: Some(Outbox::new(given.line)),
            family: Family::new(),
            members: BTreeMap::new(),
            waits: Vec::new(),
            asked: Vec::new(),
            evictions: Vec::new(),
            fork: None,
            said: 0,
            filled: Vec::new(),
            free: Vec::new(),
        };
        server.join(MemberId::ROOT, root);
        server.answer(true);
        Ok(server)
    }

    /// Serves until nobody is left.
    pub(super) fn run(mut self) {
        while !self.family.is_extinct() {
            let Ok(ready) = self.wait() else {
                break;
            };
            self.obey();
            self.listen();
            for id in ready {
                self.hear(id);
            }
            self.serve();
            self.evict();
            self.bury_dead();
            self.tell();
        }
        self.say(Message::new(Kind::ForkEnded));
    }

    /// Waits for something to do; the members that did something.
    fn wait(&self) -> Result<Vec<MemberId>, Errno> {
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        for socket in [&self.desk, &self.line].into_iter().flatten() {
            let interest = match socket.is_blocked() {
                true => PollFlags::IN | PollFlags::OUT,
                false => PollFlags::IN,
            };
            fds.push(PollFd::from_borrowed_fd(socket.as_fd(), interest));
        }
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
        let members = self.members.keys().zip(&fds[first..]);
        Ok(members
            .filter_map(|(id, fd)| fired(fd).then_some(*id))
            .collect())
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
        while let Some(message) = next(&mut self.desk) {
            match message.kind() {
                Some(Kind::ForkAnswer) => self.broker_answered(message.id(), message.arg(0) == 0),
                Some(Kind::ForkEvict) => {
                    self.asked.extend(message.ranges().as_slice());
                    if message.flags() & FORK_LAST != 0 {
                        self.begin_eviction(message.id());
                    }
                }
                _ => {}
            }
        }
        if self.desk.is_none() && self.fork.as_ref().is_some_and(|f| !f.unanswered.is_empty()) {
            // Whoever would say so is gone.
            self.settle(false);
        }
    }

    fn begin_eviction(&mut self, id: u64) {
        let asked = std::mem::take(&mut self.asked);
        let granules = asked
            .iter()
            .flat_map(|range| (range.offset..range.end()).step_by(GRANULE as usize));
        let originals: Vec<u64> = granules.filter(|o| self.family.is_needed(*o)).collect();
        self.evictions.push(Eviction {
            id,
            bytes: originals.len() as u64 * GRANULE,
            originals,
        });
    }

    fn broker_answered(&mut self, id: u64, yes: bool) {
        // One comes twice when a broker died over it.
        if let Some(fork) = &mut self.fork
            && fork.unanswered.remove(&id)
        {
            fork.refused |= !yes;
            if fork.unanswered.is_empty() {
                let refused = fork.refused;
                self.settle(!refused);
            }
        }
    }

    /// What the root shares is the family's now, or the fork can't be served.
    fn settle(&mut self, yes: bool) {
        let Some(fork) = &mut self.fork else {
            return;
        };
        fork.unanswered.clear();
        fork.settled = yes;
        let runs = std::mem::take(&mut fork.runs);
        if yes {
            self.family.share(&runs);
        }
        self.answer(yes);
    }

    /// What the root says around a fork.
    fn listen(&mut self) {
        while let Some(message) = next(&mut self.line) {
            match message.kind() {
                Some(Kind::ForkBegin) => {
                    self.fork = Some(Fork::default());
                    self.answer(true);
                }
                Some(Kind::ForkShare) if self.fork.is_some() => {
                    self.root_shares(&message);
                }
                Some(Kind::ForkEnd) => self.fork = None,
                _ => self.line = None,
            }
        }
    }

    fn root_shares(&mut self, message: &Message) {
        let end = self.mapping.len();
        let Some(fork) = &mut self.fork else {
            return;
        };
        let whole = |n: u64| n.is_multiple_of(GRANULE);
        let sane = |run: &SharedRun| {
            run.len > 0
                && whole(run.addr)
                && whole(run.offset)
                && whole(run.len)
                && run.end() <= end
                && run.addr.checked_add(run.len).is_some()
        };
        fork.refused |= !message.shared_runs().all(|run| sane(&run));
        fork.runs.extend(message.shared_runs());
        if message.flags() & FORK_LAST == 0 {
            return;
        }
        if fork.refused || fork.runs.is_empty() {
            let yes = !fork.refused;
            return self.settle(yes);
        }
        let windows: Vec<WindowRange> = fork.runs.iter().map(SharedRun::window).collect();
        for chunk in windows.chunks(MAX_RANGES) {
            self.said += 1;
            if let Some(fork) = &mut self.fork {
                fork.unanswered.insert(self.said);
            }
            let message = Message::new(Kind::ForkShare).with_id(self.said);
            self.say(message.with_ranges(chunk));
        }
    }

    fn answer(&mut self, yes: bool) {
        let message = Message::new(Kind::ForkAnswer).with_arg(0, u64::from(!yes));
        send(&mut self.line, message);
    }

    fn say(&mut self, message: Message) {
        send(&mut self.desk, message);
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
                    let unsettled = self.fork.as_ref().is_some_and(|fork| !fork.settled);
                    let child = self.family.born(id, unsettled && id == MemberId::ROOT);
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
            // The root covers first, and says what was there afterwards.
            let unsettled = self.fork.as_ref().is_some_and(|fork| !fork.settled);
            return if id == MemberId::ROOT && unsettled {
                Filled::Later
            } else if self.family.is_doubtful(id) {
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
                let done = Message::new(Kind::ForkEvicted).with_id(eviction.id);
                self.say(done.with_arg(0, eviction.bytes));
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
            .filter(|id| !self.family.is_doubtful(**id))
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
        for chunk in std::mem::take(&mut self.free).chunks(MAX_RANGES) {
            self.say(Message::new(Kind::ForkFree).with_ranges(chunk));
        }
        if self.fork.is_none() {
            for chunk in std::mem::take(&mut self.filled).chunks(MAX_RUNS) {
                let message = Message::new(Kind::ForkFilled).with_runs(chunk);
                send(&mut self.line, message);
            }
        }
    }
}

/// Sends, if there is still somebody to send to.
fn send(to: &mut Option<Outbox>, message: Message) {
    if to.as_mut().is_some_and(|to| to.send(message).is_err()) {
        *to = None;
    }
}

/// The next message that is there. Whoever is gone is let go of.
fn next(from: &mut Option<Outbox>) -> Option<Message> {
    let socket = from.as_mut()?;
    let received = socket
        .flush()
        .and_then(|()| receive_message(socket.as_fd(), &mut Descriptors::default()));
    match received {
        Ok(message) => Some(message),
        Err(SocketError::System(Errno::AGAIN)) => None,
        Err(_) => {
            *from = None;
            None
        }
    }
}
