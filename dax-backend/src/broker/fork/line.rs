//! What the root says on its line: what it shares before a fork, and what it
//! takes back when nobody else needs it any more.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use super::family::{MemberId, granules, push_run};
use super::server::{BURST, Server, next, send};
use crate::broker::protocol::{
    FORK_LAST, GRANULE, Kind, MAX_RANGES, MAX_RUNS, Message, SharedRun, WindowRange,
};

/// A fork of the root that has begun and not ended.
#[derive(Default)]
pub(super) struct Fork {
    /// What the root's question has for a number.
    question: u64,
    /// What the root says that it shares.
    runs: Vec<SharedRun>,
    /// Which granules of the window that is.
    named: Vec<bool>,
    /// It has said all.
    asked: bool,
    /// What the broker has not answered yet.
    unanswered: BTreeSet<u64>,
    refused: bool,
    /// The books have it all.
    settled: bool,
}

impl Fork {
    /// Whether granules of a window of `len` bytes are named the first time.
    fn names(&mut self, run: &SharedRun, len: u64) -> bool {
        self.named.resize((len / GRANULE) as usize, false);
        granules(run).all(|(_, original)| {
            let named = self.named.get_mut((original / GRANULE) as usize);
            named.is_some_and(|named| !std::mem::replace(named, true))
        })
    }
}

/// Originals on their way back to the root. It waits for them, if it touches
/// them, until it has them in place.
pub(super) struct Taking {
    runs: Vec<SharedRun>,
    /// What the root's question has for a number.
    question: u64,
    /// What the broker is to answer.
    id: u64,
    /// They are the root's, and need to be put in place.
    given: bool,
}

impl Server {
    /// Whether the root may have covered what the books don't have yet.
    pub(super) fn is_unsettled(&self) -> bool {
        self.fork.as_ref().is_some_and(|fork| !fork.settled)
    }

    /// Whether the broker is about to answer what the root shares.
    pub(super) fn is_unanswered(&self) -> bool {
        self.fork.as_ref().is_some_and(|f| !f.unanswered.is_empty())
    }

    /// Whether the books may lack what a child of the root inherits now. Only
    /// one that no handler of fork(2) saw is made while something is taken.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.is_unsettled() || self.taking.is_some()
    }

    /// Whether a granule is on its way back to the root.
    pub(super) fn is_taken(&self, place: u64) -> bool {
        let on_its_way = |run: &SharedRun| (run.addr..run.addr + run.len).contains(&place);
        self.taking
            .as_ref()
            .is_some_and(|taking| taking.runs.iter().any(on_its_way))
    }

    /// What the root says around a fork.
    pub(super) fn listen(&mut self) {
        for _ in 0..BURST {
            let Some(message) = self.next_of_root() else {
                break;
            };
            match message.kind() {
                // It waits for an answer, or else it would not be heard to an
                // end: each of its forks is the broker's work, too.
                Some(Kind::ForkBegin | Kind::ForkEnd) if self.is_unanswered() => self.line = None,
                Some(Kind::ForkBegin) => {
                    self.fork = Some(Fork::default());
                    self.answer(message.id(), true);
                }
                Some(Kind::ForkShare) if self.may_share() => self.root_shares(&message),
                Some(Kind::ForkEnd) => {
                    let refused = self.is_unsettled();
                    self.fork = None;
                    if refused {
                        self.have_root_retry();
                    }
                }
                Some(Kind::ForkTake) if self.fork.is_none() => self.root_takes(&message),
                Some(Kind::ForkTaken) => self.taken(),
                _ => self.line = None,
            }
        }
        if self.line.is_none() {
            // Who asked is gone, and touches nothing any more.
            self.fork = None;
            self.taking = None;
        }
        if self.desk.is_none() {
            // Whoever would answer is gone.
            if self.is_unanswered() {
                self.settle(false);
            }
            if self.taking.as_ref().is_some_and(|taking| !taking.given) {
                self.give(false);
            }
        }
    }

    /// What the root says next; nothing while it does not read what it is told,
    /// which would pile up here.
    fn next_of_root(&mut self) -> Option<Message> {
        let line = self.line.as_mut()?;
        if line.flush().is_ok() && line.is_blocked() {
            return None;
        }
        next(&mut self.line).map(|(message, _)| message)
    }

    /// Whether the root has more to say of what it shares.
    fn may_share(&self) -> bool {
        self.fork.as_ref().is_some_and(|fork| !fork.asked)
    }

    fn root_shares(&mut self, message: &Message) {
        let Some(fork) = &mut self.fork else {
            return;
        };
        let end = self.mapping.len();
        for run in message.shared_runs() {
            // What is an original already is no lease of the root's. So no books
            // get longer than the window.
            let known = |run: &SharedRun| granules(run).any(|(_, o)| self.family.is_needed(o));
            fork.refused |= !is_sane(&run, end) || !fork.names(&run, end) || known(&run);
            if !fork.refused {
                fork.runs.push(run);
            }
        }
        if message.flags() & FORK_LAST == 0 {
            return;
        }
        fork.asked = true;
        fork.question = message.id();
        if fork.refused || fork.runs.is_empty() {
            let yes = !fork.refused;
            return self.settle(yes);
        }
        let windows: Vec<WindowRange> = fork.runs.iter().map(SharedRun::window).collect();
        for chunk in windows.chunks(MAX_RANGES) {
            let id = self.ask(Kind::ForkShare, chunk);
            if let Some(fork) = &mut self.fork {
                fork.unanswered.insert(id);
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
        let question = fork.question;
        if yes {
            self.family.share(&runs);
            self.have_root_retry();
        }
        self.answer(question, yes);
    }

    /// Says what the root could take, from an address on.
    fn offer(&mut self, question: u64, from: u64) {
        let mut runs = Vec::new();
        if !self.is_evicting() {
            let waits = |place| self.is_root_waiting(place);
            let alone = self.family.roots_alone();
            for (place, original) in alone.filter(|(place, _)| *place >= from && !waits(*place)) {
                push_run(&mut runs, place, original);
                if runs.len() > MAX_RUNS {
                    runs.pop();
                    break;
                }
            }
        }
        let message = Message::new(Kind::ForkAnswer).with_id(question);
        send(&mut self.line, message.with_runs(&runs));
    }

    /// Whether the root waits for a granule. It may have a part of it already,
    /// and have written there.
    fn is_root_waiting(&self, place: u64) -> bool {
        let granule = place..place + GRANULE;
        let mut waits = self.waits.iter();
        waits.any(|(id, addr)| *id == MemberId::ROOT && granule.contains(addr))
    }

    /// The root wants originals back that nobody else needs.
    fn root_takes(&mut self, message: &Message) {
        let end = self.mapping.len();
        let runs: Vec<SharedRun> = message.shared_runs().collect();
        if runs.is_empty() {
            return self.offer(message.id(), message.arg(0));
        }
        let sane = runs.iter().all(|run| is_sane(run, end));
        if !sane || self.taking.is_some() || self.is_evicting() || self.desk.is_none() {
            return self.answer(message.id(), false);
        }
        let windows: Vec<WindowRange> = runs.iter().map(SharedRun::window).collect();
        self.taking = Some(Taking {
            runs,
            question: message.id(),
            id: 0,
            given: false,
        });
        // A child that was made before this is known, or the root is in the
        // middle of making it; one that is made later is in doubt.
        self.hear(MemberId::ROOT);
        let alone = self.taking.as_ref().is_some_and(|taking| {
            let mut all = taking.runs.iter().flat_map(granules);
            all.all(|(place, original)| {
                self.family.is_roots_alone(place, original) && !self.is_root_waiting(place)
            })
        });
        if !alone || self.is_root_changing() {
            self.taking = None;
            return self.answer(message.id(), false);
        }
        let id = self.ask(Kind::ForkTake, &windows);
        if let Some(taking) = &mut self.taking {
            taking.id = id;
        }
    }

    /// The broker has answered the root's wish.
    fn give(&mut self, yes: bool) {
        let Some(taking) = &mut self.taking else {
            return;
        };
        let question = taking.question;
        if yes {
            taking.given = true;
            for (place, _) in taking.runs.iter().flat_map(granules) {
                // Nobody needs it any more, and yet it is not free.
                let _ = self.family.filled(MemberId::ROOT, place);
            }
        } else {
            self.taking = None;
        }
        self.answer(question, yes);
    }

    /// The root has put them in place, and woken who waited.
    fn taken(&mut self) {
        let waits = std::mem::take(&mut self.waits);
        let other = |(id, addr): &(MemberId, u64)| {
            *id != MemberId::ROOT || !self.is_taken(addr - addr % GRANULE)
        };
        self.waits = waits.into_iter().filter(other).collect();
        self.taking = None;
    }

    pub(super) fn broker_answered(&mut self, id: u64, yes: bool) {
        let asked = |taking: &Taking| taking.id == id && !taking.given;
        if self.taking.as_ref().is_some_and(asked) {
            return self.give(yes);
        }
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

    /// Asks the broker something about ranges; the number of its answer.
    fn ask(&mut self, kind: Kind, ranges: &[WindowRange]) -> u64 {
        self.said += 1;
        self.say(Message::new(kind).with_id(self.said).with_ranges(ranges));
        self.said
    }

    /// Answers the root; `question` is the number of what it asked.
    pub(super) fn answer(&mut self, question: u64, yes: bool) {
        let message = Message::new(Kind::ForkAnswer).with_id(question);
        send(&mut self.line, message.with_arg(0, u64::from(!yes)));
    }
}

/// Whether a run is whole granules in a window that ends at `end`.
fn is_sane(run: &SharedRun, end: u64) -> bool {
    let whole = |n: u64| n.is_multiple_of(GRANULE);
    run.len > 0
        && whole(run.addr)
        && whole(run.offset)
        && whole(run.len)
        && run.end() <= end
        && run.addr.checked_add(run.len).is_some()
}
