//! Forks that share extents, as far as the broker's books go.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dax_backend::broker::admin::{AdminReply, AdminRequest, ReleaseTarget};
use dax_backend::broker::client::ForkLine;
use dax_backend::broker::protocol::SharedRun;
use dax_backend::broker::protocol::{FORK_LAST, Kind, MESSAGE_SIZE, Message};
use dax_backend::broker::{BrokerClient, ForkFamily, GRANULE, Store, StoreSocket, WindowRange};
use rustix::io::Errno;
use rustix::mm::UserfaultfdFlags;
use rustix::net::{SendFlags, send};

use crate::rig::{Client, PATIENCE, Rig, Setup, is_zero, scribble};

/// Where a program has its heap; nothing is there in this one.
const HEAP: u64 = 64 * GRANULE;

fn userfaultfd() -> OwnedFd {
    // SAFETY: it serves nothing.
    unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC) }.unwrap()
}

/// A client whose forks are served; `None`: the broker has no right to.
fn served(client: &Client) -> Option<ForkLine> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only with CAP_SYS_PTRACE forks are served");
        return None;
    }
    let line = client.broker.serve_forks(userfaultfd().as_fd(), 0);
    Some(line.unwrap())
}

/// The client shares the first granules of the window.
fn share(line: &ForkLine, granules: u64) {
    line.begin(&mut |_| ()).unwrap();
    let run = SharedRun {
        addr: HEAP,
        offset: 0,
        len: granules * GRANULE,
    };
    line.share(&|from| (from <= HEAP).then_some(run)).unwrap();
}

#[test]
fn a_family_hears_of_what_was_taken_before_it_had_it() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    client.lease(8);
    let Some(line) = served(&client) else {
        return;
    };
    let forced = AdminRequest::Release {
        target: ReleaseTarget::Range(rig.range(0, 1)),
        deadline_ms: 0,
        force: true,
        past_deadline: false,
        progress: false,
    };
    assert!(matches!(rig.ask(&forced), Ok(AdminReply::Receipt(_))));
    assert!(client.next_recall().3, "it is lost");
    share(&line, 4);
    line.end().unwrap();
    let status = rig.status();
    // What is lost was no lease any more when it was shared.
    assert_eq!(status.clients[0].leased, 4 * GRANULE);
    assert_eq!(status.counters.forked_bytes, 3 * GRANULE);
    // Nobody has it once all who needed it get SIGBUS.
    rig.until(Duration::from_secs(20), |status| status.capacity.lost == 0);
    assert_eq!(rig.status().capacity.forked, 3 * GRANULE);
}

#[test]
fn what_came_back_is_shared_again() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    client.lease(8);
    let Some(line) = served(&client) else {
        return;
    };
    for _ in 0..3 {
        share(&line, 4);
        line.end().unwrap();
        assert_eq!(rig.status().capacity.forked, 4 * GRANULE);
        // No child was made, so all of it is the client's alone.
        let offered = line.offered(0, &mut |_| ()).unwrap();
        line.take(&offered, &mut |_| ()).unwrap();
        line.taken().unwrap();
        assert_eq!(rig.status().capacity.forked, 0);
    }
    assert_eq!(rig.status().clients[0].leased, 8 * GRANULE);
}

/// The desk and the line of a fork server that the test is.
static SERVER: Mutex<Option<[OwnedFd; 2]>> = Mutex::new(None);
/// There is one [`SERVER`] for all tests.
static ALONE: Mutex<()> = Mutex::new(());

/// A broker of whose forks the test is the server, for one test at a time.
fn without_server() -> (Rig, MutexGuard<'static, ()>) {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let rig = Rig::with(Setup {
        offer: &[8],
        serve_family: take_over,
        ..Setup::default()
    });
    (rig, alone)
}

/// The desk and the line of the server that was started last.
fn server() -> [OwnedFd; 2] {
    SERVER.lock().unwrap().take().unwrap()
}

fn take_over(family: ForkFamily) -> io::Result<()> {
    let (ours, theirs) = StoreSocket::pair()?;
    family.send(&ours)?;
    let mut store = Store::receive(theirs)?;
    let [desk, line] = ["desk", "line"].map(|name| store.take(name).unwrap());
    let mut server = SERVER.lock().unwrap();
    say(&line, Message::new(Kind::ForkAnswer));
    *server = Some([desk, line]);
    Ok(())
}

fn say(to: &OwnedFd, message: Message) {
    rustix::io::write(to, message.bytes()).unwrap();
}

/// Asks the broker; whether it says yes.
fn says_yes(desk: &OwnedFd, kind: Kind, granules: u64) -> bool {
    let range = WindowRange {
        offset: 0,
        len: granules * GRANULE,
    };
    say(desk, Message::new(kind).with_ranges(&[range]));
    loop {
        let mut answer = [0; MESSAGE_SIZE];
        assert_eq!(rustix::io::read(desk, &mut answer), Ok(MESSAGE_SIZE));
        let answer = Message::parse(&answer).unwrap();
        // What it wants itself may come first.
        if answer.kind() == Some(Kind::ForkAnswer) {
            return answer.arg(0) == 0;
        }
    }
}

/// A broker dies between the two: the next one reads the message again.
#[test]
fn what_a_broker_has_given_back_the_next_one_does_not_refuse() {
    let (rig, _alone) = without_server();
    let client = rig.client();
    client.lease(8);
    let Some(_line) = served(&client) else {
        return;
    };
    let [desk, _line_end] = server();
    assert!(says_yes(&desk, Kind::ForkShare, 4));
    assert!(says_yes(&desk, Kind::ForkTake, 2));
    let leased = || rig.status().clients[0].leased;
    assert_eq!(leased(), 6 * GRANULE);
    std::thread::scope(|scope| {
        let (held, whole) = (&rig, ReleaseTarget::Range(rig.range(0, 8)));
        let recall = scope.spawn(move || held.release(whole, 2000));
        client.next_recall();
        assert!(says_yes(&desk, Kind::ForkTake, 2), "it is the client's");
        assert!(!says_yes(&desk, Kind::ForkTake, 4), "it is wanted back");
        recall.join().unwrap();
    });
    assert_eq!(leased(), 6 * GRANULE);
}

/// Its client has not heard that it shares, and goes on using what it has.
#[test]
fn what_a_killed_server_has_shared_is_lent_to_nobody() {
    let (mut rig, _alone) = without_server();
    let client = rig.client();
    let (leased, _) = client.lease(8);
    let memory = client.memory();
    scribble(memory, &leased);
    let Some(line) = served(&client) else {
        return;
    };
    let [desk, line_end] = server();
    assert!(says_yes(&desk, Kind::ForkShare, 4));
    drop((desk, line_end, line));
    let status = rig.until(PATIENCE, |status| status.capacity.forked == 0);
    assert_eq!(status.clients[0].leased, 8 * GRANULE);
    let (granted, exhausted) = rig.client().lease(8);
    assert!(granted.is_empty() && exhausted, "lent twice");
    assert!(!is_zero(memory, &leased[..1]), "wiped");

    // A broker that comes after this one hears what of it is in use.
    rig.restart(|_| ());
    let id = client.welcome.client_id;
    let held = WindowRange {
        offset: 0,
        len: 2 * GRANULE,
    };
    let page = &client.welcome.page;
    let back = BrokerClient::rejoin(&rig.socket(), id, page, [held].into_iter());
    assert!(back.is_ok(), "{back:?}");
    assert_eq!(rig.status().clients[0].leased, held.len);
}

#[test]
fn who_floods_its_line_loses_it_and_holds_up_nobody() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    client.lease(8);
    let Some(line) = served(&client) else {
        return;
    };
    line.begin(&mut |_| ()).unwrap();
    let run = SharedRun {
        addr: HEAP,
        offset: 0,
        len: GRANULE,
    };
    let share = Message::new(Kind::ForkShare).with_flags(FORK_LAST);
    let share = share.with_runs(&[run]);
    let flood = || send(line.fd(), share.bytes(), SendFlags::NOSIGNAL);
    let refused = (0..2000).find_map(|_| flood().err());
    // It depends on what was unread.
    let closed = [Errno::PIPE, Errno::CONNRESET].map(Some);
    assert!(closed.contains(&refused), "{refused:?}");
    assert!(rig.status().capacity.forked <= GRANULE);
}
