//! Who holds which granule of a broker's, by what it has said itself.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use dax_backend::broker::protocol::{Kind, Message};
use dax_backend::broker::status::Status;
use dax_backend::broker::{GRANULE, WindowRange};

use crate::peer::{Attached, Heard, Peer};

/// More than any window here has.
const MOST_GRANULES: u64 = 1024;

/// One who talks with the broker.
struct Party {
    peer: Peer,
    hello: Message,
    /// Numbers of granules that were granted to it, and that it has not said to return.
    held: BTreeSet<u64>,
    /// Those that it has said to return without having heard that it has them. The broker may have granted them
    /// before it heard so, or may grant them after: nobody can tell.
    unclear: BTreeSet<u64>,
    /// It was cut off. What was sent before can still be read then, and means nothing any more.
    closed: bool,
}

impl Party {
    fn new(peer: Peer, hello: Message) -> Self {
        peer.send(hello.bytes(), &Attached::Nothing);
        Self {
            peer,
            hello,
            held: BTreeSet::new(),
            unclear: BTreeSet::new(),
            closed: false,
        }
    }
}

/// All who talk with the broker.
pub struct Judge<C> {
    connect: C,
    parties: Vec<Party>,
    operator: Peer,
    /// Heard, and not judged yet: by whom, and what.
    heard: Vec<(usize, Message)>,
}

impl<C: Fn() -> Peer> Judge<C> {
    /// `hellos` are said by a connection each, `operator` by one more.
    pub fn new(connect: C, hellos: impl IntoIterator<Item = Message>, operator: Message) -> Self {
        let parties = hellos.into_iter().map(|hello| Party::new(connect(), hello));
        Self {
            parties: parties.collect(),
            operator: Party::new(connect(), operator).peer,
            connect,
            heard: Vec::new(),
        }
    }

    fn index(&self, who: u8) -> usize {
        usize::from(who) % self.parties.len()
    }

    /// Number `who`, counted round and round.
    pub fn peer(&self, who: u8) -> &Peer {
        &self.parties[self.index(who)].peer
    }

    /// What it holds.
    pub fn held(&self, who: u8) -> impl Iterator<Item = u64> {
        self.parties[self.index(who)].held.iter().copied()
    }

    /// Has it say `message`. What it says to return it holds no more, from before the broker hears so.
    pub fn say(&mut self, who: u8, message: &Message, attached: &Attached) {
        let index = self.index(who);
        let party = &mut self.parties[index];
        if message.kind() == Some(Kind::Return) {
            for range in message.ranges().as_slice() {
                let (first, end) = (range.offset / GRANULE, range.end().div_ceil(GRANULE));
                // Beyond the window there is nothing to hold.
                for granule in first..end.min(first.saturating_add(MOST_GRANULES)) {
                    if !party.held.remove(&granule) {
                        party.unclear.insert(granule);
                    }
                }
            }
        }
        party.peer.send(message.bytes(), attached);
    }

    /// Has the operator send a request, and not wait for the answer.
    pub fn order(&self, json: Vec<u8>) {
        self.operator.send(
            Message::new(Kind::AdminRequest).bytes(),
            &Attached::Text(json),
        );
    }

    /// Has it close its connection, and somebody else like it come.
    pub fn leave(&mut self, who: u8) {
        let index = self.index(who);
        let hello = self.parties[index].hello;
        self.heard.retain(|(by, _)| *by != index);
        self.parties[index] = Party::new((self.connect)(), hello);
    }

    /// Reads all that has come. Whoever is cut off holds nothing any more: nothing maps its page.
    fn listen(&mut self) -> Vec<(usize, Message)> {
        let mut heard = Vec::new();
        let mut closed = Vec::new();
        for (index, party) in self.parties.iter_mut().enumerate() {
            while !party.closed {
                match party.peer.hear() {
                    Heard::Nothing => break,
                    Heard::Message(message) => heard.push((index, *message)),
                    Heard::Closed => {
                        party.held.clear();
                        party.closed = true;
                        closed.push(index);
                        break;
                    }
                }
            }
        }
        self.heard.retain(|(by, _)| !closed.contains(by));
        heard.retain(|(by, _)| !closed.contains(by));
        while matches!(self.operator.hear(), Heard::Message(_)) {}
        heard
    }

    /// Judges what has come. Read twice, because what was granted to one may have been another's who was cut off, and
    /// that is seen for sure only by who looks afterwards.
    pub fn hear(&mut self) {
        let first = self.listen();
        self.heard.extend(first);
        let second = self.listen();
        let due = std::mem::replace(&mut self.heard, second);
        for (by, message) in due {
            if message.kind() == Some(Kind::Grant) {
                for range in message.ranges().as_slice() {
                    self.granted(by, *range);
                }
            }
        }
    }

    fn granted(&mut self, to: usize, range: WindowRange) {
        assert!(range.offset.is_multiple_of(GRANULE) && range.len.is_multiple_of(GRANULE));
        for granule in range.offset / GRANULE..range.end() / GRANULE {
            for (other, party) in self.parties.iter().enumerate() {
                let free = !party.held.contains(&granule);
                assert!(
                    free,
                    "granule {granule} is granted to {to} while {other} holds it"
                );
            }
            if !self.parties[to].unclear.contains(&granule) {
                self.parties[to].held.insert(granule);
            }
        }
    }

    /// All granules that somebody holds, as far as is known.
    pub fn held_by_all(&self) -> BTreeSet<u64> {
        let held = self.parties.iter().flat_map(|party| &party.held);
        held.copied().collect()
    }

    /// Whether the broker's books agree. Between the status and what is heard after it leases come and go: what was
    /// held `before` it, and is still, was leased.
    pub fn check(&self, status: &Status, before: &BTreeSet<u64>) {
        let capacity = &status.capacity;
        let leased: u64 = status.clients.iter().map(|client| client.leased).sum();
        assert_eq!(leased, capacity.leased, "{capacity:?}");
        let held = self.held_by_all().intersection(before).count();
        assert!(
            held as u64 * GRANULE <= capacity.leased + capacity.lost,
            "{held} granules are held: {capacity:?}"
        );
        let known =
            capacity.leased + capacity.free + capacity.stranded + capacity.broken + capacity.shared;
        // What is with the device at the moment is only on its way.
        let all = known..=known + capacity.outgoing;
        assert!(all.contains(&capacity.accepted), "{capacity:?}");
    }
}
