//! Forks that share extents, as far as the broker's books go.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use dax_backend::broker::GRANULE;
use dax_backend::broker::admin::{AdminReply, AdminRequest, ReleaseTarget};
use dax_backend::broker::client::ForkLine;
use dax_backend::broker::protocol::SharedRun;
use rustix::mm::UserfaultfdFlags;

use crate::rig::{Client, Rig};

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
