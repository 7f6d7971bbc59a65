//! The fork server of one family: it ends the waits of all its members.
//!
//! One for each family, so that no client waits for another's copies, nor for
//! a device, and none can hold up more than its own.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use uuid::Uuid;

use super::ForkFamily;
use super::family::{Family, MemberId, push_run};
use super::line::{Fork, Taking};
use super::member::{Member, farewell};
use super::outbox::Outbox;
use super::uffd::{Event, Filled, PAGE, Uffd};
use crate::broker::lease::push_merged;
use crate::broker::mapping::Mapping;
use crate::broker::protocol::{
    FORK_LAST, GRANULE, Kind, MAX_RANGES, MAX_RUNS, Message, SharedRun, WindowRange,
};
use crate::broker::socket::{Descriptors, SocketError, receive_message};

/// Between attempts at what could not be done at once.
const RETRY: Duration = Duration::from_millis(1);
/// Events read of one member, or messages of one socket, before the others get
/// their turn.
pub(super) const BURST: usize = 64;

struct Eviction {
    id: u64,
    bytes: u64,
    originals: Vec<u64>,
}

/// One family being served.
pub(super) struct Server {
    /// The client's number, and the address of its page for descendants.
    client: u32,
    mark: u64,
    pub(super) mapping: Mapping,
    /// The broker; `None`: there is none any more.
    pub(super) desk: Option<Outbox>,
    /// The root speaks here around a fork; `None`: it has stopped.
    pub(super) line: Option<Outbox>,
    pub(super) family: Family,
    pub(super) members: BTreeMap<MemberId, Member>,
    /// Faults to serve, in order.
    pub(super) waits: Vec<(MemberId, u64)>,
    /// What the broker says of originals that the books don't have yet.
    early: VecDeque<Message>,
    /// What the broker is about to ask for.
    asked: Vec<WindowRange>,
    evictions: Vec<Eviction>,
    /// Originals that the device has taken and somebody is still to be told of.
    lost: BTreeSet<u64>,
    pub(super) fork: Option<Fork>,
    pub(super) taking: Option<Taking>,
    /// Messages to the broker that it answers.
    pub(super) said: u64,
    filled: Vec<SharedRun>,
    free: Vec<WindowRange>,
}

impl Server {
    pub(super) fn new(given: ForkFamily) -> Result<Self, Errno> {
        let mapping = Mapping::new(given.window.as_fd(), given.base, given.len)?;
        let root = Uffd::new(given.userfaultfd)?;
        let mut server = Self {
            client: given.client,
            mark: given.mark,
            mapping,
            desk: Some(Outbox::new(given.desk)),
            line: Some(Outbox::new(given.line)),
            family: Family::new(),
            members: BTreeMap::new(),
            waits: Vec::new(),
            early: VecDeque::new(),
            asked: Vec::new(),
            evictions: Vec::new(),
            lost: BTreeSet::new(),
            fork: None,
            taking: None,
            said: 0,
            filled: Vec::new(),
            free: Vec::new(),
        };
        let root = Member::new(root, new_key());
        server.members.insert(MemberId::ROOT, root);
        server.answer(0, true);
        Ok(server)
    }

    /// Serves until nobody is left.
    pub(super) fn run(mut self) {
        while !self.family.is_extinct() {
            let Ok(ready) = self.wait() else {
                break;
            };
            self.turn(&ready);
        }
        self.tell();
        self.say(Message::new(Kind::ForkEnded));
    }

    /// Does what there is to do; `ready` are members that did something.
    pub(super) fn turn(&mut self, ready: &[MemberId]) {
        self.obey();
        self.listen();
        for id in ready {
            self.hear(*id);
        }
        self.poison_lost();
        self.serve();
        self.evict();
        self.tell();
        self.bury_dead();
    }

    /// Waits for something to do; the members that did something.
    fn wait(&self) -> Result<Vec<MemberId>, Errno> {
        let mut fds: Vec<PollFd<'_>> = Vec::new();
        // The root is not listened to while it does not listen.
        let both = PollFlags::IN | PollFlags::OUT;
        for (socket, blocked) in [(&self.desk, both), (&self.line, PollFlags::OUT)] {
            let Some(socket) = socket else {
                continue;
            };
            let interest = match socket.is_blocked() {
                true => blocked,
                false => PollFlags::IN,
            };
            fds.push(PollFd::from_borrowed_fd(socket.as_fd(), interest));
        }
        let first = fds.len();
        let members = self.members.values();
        fds.extend(members.map(|m| PollFd::from_borrowed_fd(m.uffd.as_fd(), PollFlags::IN)));
        let idle = self.waits.is_empty() && self.evictions.is_empty() && self.lost.is_empty();
        let timeout = if idle {
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

    /// A member has forked.
    pub(super) fn born(&mut self, parent: MemberId, uffd: Uffd) -> MemberId {
        let doubtful = parent == MemberId::ROOT && self.is_in_doubt();
        let id = self.family.born(parent, doubtful);
        let child = match self.members.get(&parent) {
            Some(parent) => parent.child(uffd, new_key()),
            None => Member::new(uffd, new_key()),
        };
        self.members.insert(id, child);
        id
    }

    /// A descendant wants to hear what it has copies of.
    fn attach(&mut self, key: u64, line: OwnedFd) {
        match self.members.values_mut().find(|member| member.key == key) {
            Some(member) => member.hears(line),
            // It needs nothing any more.
            None => farewell(Outbox::new(line)),
        }
    }

    /// What the broker wants.
    fn obey(&mut self) {
        for _ in 0..BURST {
            self.obey_early();
            let Some((message, fds)) = next(&mut self.desk) else {
                break;
            };
            self.obey_order(message, fds);
        }
        self.obey_early();
    }

    /// What had to wait until the broker had answered.
    fn obey_early(&mut self) {
        while !self.is_unanswered()
            && let Some(message) = self.early.pop_front()
        {
            self.obey_order(message, Descriptors::default());
        }
    }

    fn obey_order(&mut self, message: Message, fds: Descriptors) {
        match message.kind() {
            // The broker books what it is asked for before it answers.
            Some(Kind::ForkEvict | Kind::ForkLost) if self.is_unanswered() => {
                self.early.push_back(message);
            }
            Some(Kind::ForkJoin) => {
                if let [Some(line), ..] = fds.0 {
                    self.attach(message.arg(0), line);
                }
            }
            Some(Kind::ForkAnswer) => self.broker_answered(message.id(), message.arg(0) == 0),
            Some(Kind::ForkEvict) => {
                self.asked.extend(message.ranges().as_slice());
                if message.flags() & FORK_LAST != 0 {
                    self.begin_eviction(message.id());
                }
            }
            Some(Kind::ForkLost) => self.lose(message.ranges().as_slice()),
            _ => {}
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

    pub(super) fn is_evicting(&self) -> bool {
        !(self.asked.is_empty() && self.evictions.is_empty())
    }

    /// The device has taken originals.
    fn lose(&mut self, ranges: &[WindowRange]) {
        let granules = ranges
            .iter()
            .flat_map(|range| (range.offset..range.end()).step_by(GRANULE as usize));
        let needed = granules.filter(|original| self.family.is_needed(*original));
        self.lost.extend(needed);
        self.poison_lost();
    }

    /// Whoever needs a lost original gets SIGBUS, as from an extent of its own.
    /// The root's books go on as if it had not looked.
    fn poison_lost(&mut self) {
        let mut lost = std::mem::take(&mut self.lost);
        lost.retain(|original| {
            let mut left = false;
            for (id, place) in self.family.holders(*original) {
                let member = self.members.get(&id);
                let done = member.map_or(Filled::Gone, |member| member.uffd.poison(place));
                if done == Filled::Later {
                    left = true;
                } else {
                    self.forget_waits(id, place);
                    let free = self.family.filled(id, place);
                    self.now_free(free);
                }
            }
            left
        });
        self.lost = lost;
    }

    /// Whether the root is about to fork, or changes its mappings.
    pub(super) fn is_root_changing(&self) -> bool {
        let root = self.members.get(&MemberId::ROOT);
        root.is_some_and(|root| root.uffd.is_changing())
    }

    pub(super) fn say(&mut self, message: Message) {
        send(&mut self.desk, message);
    }

    /// What a member did.
    pub(super) fn hear(&mut self, id: MemberId) {
        for _ in 0..BURST {
            let Some(member) = self.members.get(&id) else {
                return;
            };
            match member.uffd.next() {
                Ok(Some(Event::Fault(addr))) => self.waits.push((id, addr)),
                Ok(Some(Event::Fork(uffd))) => drop(self.born(id, uffd)),
                Ok(None) => {}
                Err(_) => return,
            }
        }
    }

    fn serve(&mut self) {
        let waits = std::mem::take(&mut self.waits);
        let mut ended = BTreeSet::new();
        for (id, addr) in waits {
            let granule = (id, addr - addr % GRANULE);
            // All who waited there were woken, and are heard of again if they
            // must. What is put there later might be in somebody's way.
            if ended.contains(&granule) {
                continue;
            }
            match self.fill(id, addr) {
                Filled::Later => self.waits.push((id, addr)),
                _ => drop(ended.insert(granule)),
            }
        }
    }

    /// Ends the root's waits for what is no original. It may have put its
    /// extents back there since, and be about to move them: a page put there
    /// now would end waits for that with zeroes. Who still waits for this
    /// server is heard of again.
    pub(super) fn have_root_retry(&mut self) {
        let Some(root) = self.members.get(&MemberId::ROOT) else {
            return;
        };
        self.waits.retain(|(id, addr)| {
            let place = addr - addr % GRANULE;
            let stays = *id != MemberId::ROOT || self.family.original(*id, place).is_some();
            if !stays {
                root.uffd.wake(place);
            }
            stays
        });
    }

    /// Ends the wait of a member for the page at `addr`.
    fn fill(&mut self, id: MemberId, addr: u64) -> Filled {
        let place = addr - addr % GRANULE;
        let Some(member) = self.members.get(&id) else {
            return Filled::Gone;
        };
        if addr - addr % PAGE == self.mark {
            return member
                .uffd
                .show(self.mark, [self.client.into(), member.key]);
        }
        let Some(original) = self.family.original(id, place) else {
            // The root covers first, and says what was there afterwards; what
            // it takes back it puts in place itself.
            let root = id == MemberId::ROOT;
            return if root && (self.is_unsettled() || self.is_taken(place)) {
                Filled::Later
            } else if self.family.is_doubtful(id) {
                member.uffd.poison(place)
            } else {
                member.uffd.zero(addr)
            };
        };
        let is_taken = id == MemberId::ROOT && self.is_taken(place);
        if is_taken || self.lost.contains(&original) {
            return Filled::Later;
        }
        let result = member.uffd.fill(place, self.mapping.address(original));
        match result {
            Filled::Later => return result,
            Filled::Gone => self.bury(id),
            Filled::Unreadable if member.uffd.poison(place) == Filled::Later => {
                return Filled::Later;
            }
            Filled::Unreadable => {}
            Filled::Done => {}
        }
        if result != Filled::Gone {
            match self.members.get_mut(&id) {
                _ if id == MemberId::ROOT => push_run(&mut self.filled, place, original),
                Some(member) => member.has(place, original),
                None => {}
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
                    match self.fill(id, place) {
                        Filled::Later => left = true,
                        _ => self.forget_waits(id, place),
                    }
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

    /// Who waited for a granule was woken.
    fn forget_waits(&mut self, member: MemberId, place: u64) {
        let granule = place..place + GRANULE;
        self.waits
            .retain(|(id, addr)| *id != member || !granule.contains(addr));
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
                member.lives(now);
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
        for id in idle {
            if let Some(member) = self.members.remove(&id) {
                member.dismiss();
            }
            self.bury(id);
        }
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
            self.tell_root();
        }
        self.members.values_mut().for_each(Member::tell);
    }

    /// Makes ordinary memory of what the root has copies of, and tells it.
    fn tell_root(&mut self) {
        let filled = std::mem::take(&mut self.filled);
        for (index, chunk) in filled.chunks(MAX_RUNS).enumerate() {
            let root = self.members.get(&MemberId::ROOT);
            if root.is_some_and(|root| !root.makes_ordinary(chunk)) {
                self.filled = filled[index * MAX_RUNS..].to_vec();
                return;
            }
            let message = Message::new(Kind::ForkFilled).with_runs(chunk);
            send(&mut self.line, message);
        }
    }
}

/// What a new member shows that wants to hear of its copies.
fn new_key() -> u64 {
    Uuid::new_v4().as_u64_pair().1
}

/// Sends, if there is still somebody to send to.
pub(super) fn send(to: &mut Option<Outbox>, message: Message) {
    if to.as_mut().is_some_and(|to| to.send(message).is_err()) {
        *to = None;
    }
}

/// The next message that is there. Whoever is gone is let go of.
pub(super) fn next(from: &mut Option<Outbox>) -> Option<(Message, Descriptors)> {
    let socket = from.as_mut()?;
    let mut fds = Descriptors::default();
    let received = socket
        .flush()
        .and_then(|()| receive_message(socket.as_fd(), &mut fds));
    match received {
        Ok(message) => Some((message, fds)),
        Err(SocketError::System(Errno::AGAIN)) => None,
        Err(_) => {
            *from = None;
            None
        }
    }
}
