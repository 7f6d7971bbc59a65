//! A fork server by itself: the test is its root, and its broker.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};

use super::ForkFamily;
use super::family::MemberId;
use super::server::{BURST, Server};
use super::uffd::tests::{is_present, move_another, register, served, served_moving};
use crate::broker::protocol::{
    FORK_LAST, GRANULE, Kind, MAX_RANGES, MAX_RUNS, Message, SharedRun, WindowRange,
};
use crate::broker::socket::{Descriptors, receive_message, send_message};

/// Granules of the window.
const WINDOW: u64 = 64;

struct Rig {
    server: Server,
    /// The root's end of the line.
    root: OwnedFd,
    /// The broker's end of the desk.
    broker: OwnedFd,
}

impl Rig {
    /// A server and a granule of its root.
    fn new() -> (Self, u64) {
        let ((root, line), (broker, desk)) = (pair(), pair());
        let window = memfd_create("window", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&window, WINDOW * GRANULE).unwrap();
        let (uffd, place) = served();
        let server = Server::new(ForkFamily {
            userfaultfd: uffd.as_fd().try_clone_to_owned().unwrap(),
            line,
            desk,
            window,
            base: 0,
            len: WINDOW * GRANULE,
            client: 1,
            mark: 0,
        });
        let rig = Self {
            server: server.unwrap(),
            root,
            broker,
        };
        assert_eq!(rig.root_hears(), [(Kind::ForkAnswer, 0)]);
        (rig, place)
    }

    /// The root says something, and the server does what it does then.
    fn root_says(&mut self, message: Message) {
        send_message(self.root.as_fd(), &message, &[], SendFlags::empty()).unwrap();
        self.server.turn(&[MemberId::ROOT]);
    }

    /// The broker says something, and the server does what it does then.
    fn broker_says(&mut self, message: Message) {
        send_message(self.broker.as_fd(), &message, &[], SendFlags::empty()).unwrap();
        self.server.turn(&[]);
    }

    /// The root forks and shares granules of the window from the first on,
    /// each a run of its own. But for `place` nothing is where it says.
    fn root_shares(&mut self, place: u64, count: u64) {
        self.root_says(Message::new(Kind::ForkBegin).with_id(1));
        let runs: Vec<SharedRun> = (0..count)
            .map(|i| SharedRun {
                addr: if i == 0 { place } else { 2 * i * GRANULE },
                offset: i * GRANULE,
                len: GRANULE,
            })
            .collect();
        let chunks = runs.chunks(MAX_RUNS);
        let last = chunks.len() - 1;
        for (index, chunk) in chunks.enumerate() {
            let flags = if index == last { FORK_LAST } else { 0 };
            let share = Message::new(Kind::ForkShare).with_id(2).with_flags(flags);
            self.root_says(share.with_runs(chunk));
        }
        assert_eq!(self.root_hears(), [(Kind::ForkAnswer, 1)]);
    }

    /// The broker books what the root shares, which ends its fork.
    fn broker_books(&mut self) {
        for question in said(&self.broker) {
            self.broker_says(Message::new(Kind::ForkAnswer).with_id(question.id()));
        }
        self.root_says(Message::new(Kind::ForkEnd));
        self.root_hears();
    }

    /// A member wants to hear of its copies: where it does.
    fn attach(&mut self, id: MemberId) -> OwnedFd {
        let (here, there) = pair();
        self.server.members.get_mut(&id).unwrap().hears(there);
        here
    }

    /// A member touches a granule.
    fn touch(&mut self, id: MemberId, place: u64) {
        self.server.waits.push((id, place));
        self.server.turn(&[]);
        assert!(is_present(place));
    }

    fn root_hears(&self) -> Vec<(Kind, u64)> {
        said(&self.root)
            .iter()
            .map(|message| (message.kind().unwrap(), message.id()))
            .collect()
    }
}

fn pair() -> (OwnedFd, OwnedFd) {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap()
}

/// What was said to whoever has this end.
fn said(end: &OwnedFd) -> Vec<Message> {
    let next = || receive_message(end.as_fd(), &mut Descriptors::default()).ok();
    std::iter::from_fn(next).collect()
}

#[test]
fn an_answer_has_the_number_of_its_question() {
    let (mut rig, _) = Rig::new();
    rig.root_says(Message::new(Kind::ForkBegin).with_id(5));
    assert_eq!(rig.root_hears(), [(Kind::ForkAnswer, 5)]);
    let last = Message::new(Kind::ForkShare).with_flags(FORK_LAST);
    rig.root_says(last.with_id(6));
    assert_eq!(rig.root_hears(), [(Kind::ForkAnswer, 6)]);
    rig.root_says(Message::new(Kind::ForkEnd));
    rig.root_says(Message::new(Kind::ForkTake).with_id(7));
    assert_eq!(rig.root_hears(), [(Kind::ForkAnswer, 7)]);
    assert!(said(&rig.broker).is_empty());
}

/// A wait for what the root has covered, and has put back since.
#[test]
fn no_page_is_put_where_the_root_has_its_extents_back() {
    for shares in [true, false] {
        let (mut rig, _) = Rig::new();
        rig.root_says(Message::new(Kind::ForkBegin).with_id(1));
        // Somebody else's placeholder is there by now.
        let (_mover, place) = served();
        rig.server.waits.push((MemberId::ROOT, place));
        rig.server.turn(&[]);
        assert!(!is_present(place), "the fork is not settled");
        rig.root_says(match shares {
            true => Message::new(Kind::ForkShare).with_flags(FORK_LAST),
            false => Message::new(Kind::ForkEnd),
        });
        rig.server.turn(&[]);
        assert!(!is_present(place), "shares: {shares}");
        assert_eq!(rig.server.waits, []);
    }
}

/// A recall is under way when the root forks.
#[test]
fn what_the_broker_wants_before_the_books_have_it_is_done_then() {
    let (mut rig, place) = Rig::new();
    rig.root_shares(place, MAX_RANGES as u64 + 1);
    let asked = said(&rig.broker);
    assert_eq!(asked.len(), 2);
    // One of the first question, one of the second.
    let wanted = [0, MAX_RANGES as u64].map(|i| WindowRange {
        offset: i * GRANULE,
        len: GRANULE,
    });
    let evict = Message::new(Kind::ForkEvict).with_flags(FORK_LAST);
    rig.broker_says(Message::new(Kind::ForkAnswer).with_id(asked[0].id()));
    rig.broker_says(evict.with_id(9).with_ranges(&wanted));
    assert!(said(&rig.broker).is_empty(), "it can't know");
    rig.broker_says(Message::new(Kind::ForkAnswer).with_id(asked[1].id()));
    assert_eq!(rig.root_hears(), [(Kind::ForkAnswer, 2)]);
    let said = said(&rig.broker);
    let kinds: Vec<Kind> = said.iter().filter_map(Message::kind).collect();
    assert_eq!(kinds, [Kind::ForkFree, Kind::ForkEvicted]);
    assert_eq!(said[0].ranges().as_slice(), wanted);
    assert_eq!((said[1].id(), said[1].arg(0)), (9, 2 * GRANULE));
    assert!(is_present(place));
}

#[test]
fn the_root_hears_of_its_copies_when_nobody_waits_there_any_more() {
    let (mut rig, place) = Rig::new();
    rig.root_shares(place, 1);
    let asked = said(&rig.broker);
    rig.broker_says(Message::new(Kind::ForkAnswer).with_id(asked[0].id()));
    assert_eq!(rig.root_hears(), [(Kind::ForkAnswer, 2)]);
    rig.server.waits.push((MemberId::ROOT, place));
    rig.server.turn(&[]);
    assert!(is_present(place));
    // Not before the end of the fork: its child would not hear of it.
    assert_eq!(rig.root_hears(), []);
    let (other, _) = served();
    assert_eq!(register(&other, place), Err(Errno::BUSY));
    rig.root_says(Message::new(Kind::ForkEnd));
    assert_eq!(rig.root_hears(), [(Kind::ForkFilled, 0)]);
    assert_eq!(register(&other, place), Ok(()));
}

#[test]
fn the_root_shares_once_in_a_fork_and_waits_for_the_answer() {
    for breach in [Kind::ForkShare, Kind::ForkBegin, Kind::ForkEnd] {
        let (mut rig, place) = Rig::new();
        rig.root_shares(place, 1);
        rig.root_says(Message::new(breach));
        assert!(rig.server.line.is_none(), "{breach:?}");
        assert_eq!(said(&rig.broker).len(), 1, "{breach:?}");
    }
}

#[test]
fn what_is_an_original_is_not_shared_again() {
    let (mut rig, place) = Rig::new();
    rig.root_shares(place, 1);
    let asked = said(&rig.broker);
    rig.broker_says(Message::new(Kind::ForkAnswer).with_id(asked[0].id()));
    rig.root_says(Message::new(Kind::ForkEnd));
    assert_eq!(rig.root_hears(), [(Kind::ForkAnswer, 2)]);
    let elsewhere = |offset| SharedRun {
        addr: 8 * GRANULE,
        offset,
        len: GRANULE,
    };
    // Nor is something shared in two places.
    for runs in [[0, GRANULE], [GRANULE, GRANULE]] {
        rig.root_says(Message::new(Kind::ForkBegin));
        let share = Message::new(Kind::ForkShare).with_flags(FORK_LAST);
        rig.root_says(share.with_runs(&runs.map(elsewhere)));
        let answers: Vec<u64> = said(&rig.root).iter().map(|m| m.arg(0)).collect();
        assert_eq!(answers, [0, 1]);
        rig.root_says(Message::new(Kind::ForkEnd));
    }
    assert!(said(&rig.broker).is_empty());
}

#[test]
fn a_root_that_does_not_read_is_not_listened_to() {
    let (mut rig, _) = Rig::new();
    let begin = Message::new(Kind::ForkBegin);
    let full = (0..20_000).find(|_| {
        rig.server.turn(&[]);
        send_message(rig.root.as_fd(), &begin, &[], SendFlags::DONTWAIT).is_err()
    });
    assert!(full.is_some(), "answers pile up");
    // It goes on where it was.
    let heard = said(&rig.root).len();
    rig.server.turn(&[]);
    assert!(heard > 0 && !said(&rig.root).is_empty());
}

#[test]
fn nobody_waits_for_the_end_of_what_the_root_says() {
    let (mut rig, _) = Rig::new();
    for _ in 0..=BURST {
        let begin = Message::new(Kind::ForkBegin);
        send_message(rig.root.as_fd(), &begin, &[], SendFlags::DONTWAIT).unwrap();
    }
    rig.server.turn(&[]);
    assert_eq!(rig.root_hears().len(), BURST);
    rig.server.turn(&[]);
    assert_eq!(rig.root_hears().len(), 1);
}

/// Granules that a descendant was told of are its own, perhaps another
/// family's by the time it forks.
#[test]
fn a_grandchild_is_left_alone_where_its_parent_was_told() {
    let (mut rig, _) = Rig::new();
    let ((first, told), (second, not_told)) = (served(), served());
    rig.root_shares(told, 2);
    rig.broker_books();
    let parent = rig.server.born(MemberId::ROOT, first);
    let line = rig.attach(parent);
    rig.touch(parent, told);
    assert_eq!(places(&said(&line)), [told]);
    let (other, _) = served();
    assert_eq!(register(&other, told), Ok(()), "nobody's");

    // The same place, as the child sees it: another family's.
    assert_eq!(register(&second, told), Err(Errno::BUSY));
    drop(other);
    register(&second, told).unwrap();
    let child = rig.server.born(parent, second);
    let line = rig.attach(child);
    rig.server.turn(&[]);
    // Its parent may not have read it.
    assert_eq!(places(&said(&line)), [told]);
    let (other, _) = served();
    assert_eq!(register(&other, told), Err(Errno::BUSY), "as it was");
    assert_eq!(register(&other, not_told), Err(Errno::BUSY));
}

/// What a descendant has copies of and was not told of, its child is told of.
#[test]
fn a_grandchild_is_told_of_what_its_parent_was_not() {
    let (mut rig, _) = Rig::new();
    let ((first, _), (second, place)) = (served(), served());
    rig.root_shares(place, 2);
    rig.broker_books();
    let parent = rig.server.born(MemberId::ROOT, first);
    // Nobody hears of it.
    rig.touch(parent, place);
    let child = rig.server.born(parent, second);
    let line = rig.attach(child);
    rig.server.turn(&[]);
    assert_eq!(places(&said(&line)), [place]);
    let (other, _) = served();
    assert_eq!(register(&other, place), Ok(()), "nobody's");
}

/// The places of the copies that somebody was told of.
fn places(told: &[Message]) -> Vec<u64> {
    assert!(told.iter().all(|m| m.kind() == Some(Kind::ForkFilled)));
    let runs = told.iter().flat_map(Message::shared_runs);
    runs.map(|run| run.addr).collect()
}

/// A child that is being made has what its parent had a moment ago.
#[test]
fn nobody_is_told_while_it_may_be_forking() {
    let (mut rig, _) = Rig::new();
    let (uffd, place) = served_moving();
    rig.root_shares(place, 2);
    rig.broker_books();
    let member = rig.server.born(MemberId::ROOT, uffd);
    rig.touch(member, place);
    let uffd = &rig.server.members[&member].uffd;
    // To the server it looks the same as a fork.
    let moving = move_another(uffd);
    while !uffd.is_changing() {
        std::thread::yield_now();
    }
    let line = rig.attach(member);
    rig.server.turn(&[]);
    assert_eq!(places(&said(&line)), [0u64; 0]);
    rig.server.turn(&[member]);
    moving.join().unwrap();
    rig.server.turn(&[]);
    assert_eq!(places(&said(&line)), [place]);
}
