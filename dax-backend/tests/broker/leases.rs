//! Leases: granted, returned, and ended by whatever ends a process.

use std::fs;
use std::mem::{self, offset_of};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use dax_backend::broker::client_page::PAGE_SIZE;
use dax_backend::broker::protocol::MAX_RANGES;
use dax_backend::broker::{BrokerClient, ClientPage, FromBroker, GRANULE, WindowRange};
use rustix::fs::{SealFlags, fcntl_add_seals};

use crate::process::{Forked, LIFETIME, lease_and_scribble};
use crate::rig::{PATIENCE, Rig, is_zero, scribble, total};

#[test]
fn leased_memory_is_zero_and_wiped_between_clients() {
    let rig = Rig::new(&[16]);
    let first = rig.client();
    let (ranges, exhausted) = first.lease(16);
    assert_eq!((total(&ranges), exhausted), (16 * GRANULE, false));
    let memory = first.memory();
    assert!(is_zero(memory, &ranges));
    scribble(memory, &ranges);
    first.give_back(&ranges);

    let second = rig.client();
    let (again, _) = second.lease(16);
    assert_eq!(total(&again), total(&ranges));
    assert!(is_zero(second.memory(), &again));
}

#[test]
fn an_answer_in_many_pieces_arrives_whole() {
    let rig = Rig::new(&[128]);
    let (holes, filler) = (rig.client(), rig.client());
    let mut every_other = Vec::new();
    for _ in 0..64 {
        every_other.extend(holes.lease(1).0);
        filler.lease(1);
    }
    let (left, exhausted) = rig.client().lease(8);
    assert_eq!((total(&left), exhausted), (0, true));
    holes.give_back(&every_other);
    let client = rig.client();
    let (ranges, exhausted) = client.lease(64);
    // Hardly two of them lie side by side: more than one message holds.
    assert!(ranges.len() > MAX_RANGES, "{}", ranges.len());
    assert_eq!((total(&ranges), exhausted), (64 * GRANULE, false));
}

#[test]
fn who_found_nothing_is_told_when_there_is_something() {
    let rig = Rig::new(&[4]);
    let (rich, poor) = (rig.client(), rig.client());
    let (all, _) = rich.lease(4);
    let (none, exhausted) = poor.lease(2);
    assert_eq!((total(&none), exhausted), (0, true));
    rich.give_back(&all[..1]);
    assert_eq!(poor.next(), FromBroker::CapacityAvailable);
    assert_eq!(total(&poor.lease(2).0), 2 * GRANULE);
}

#[test]
fn returns_of_what_is_not_leased_change_nothing() {
    let rig = Rig::new(&[8]);
    let (owner, other) = (rig.client(), rig.client());
    let (ranges, _) = owner.lease(4);
    other.give_back(&ranges);
    other.give_back(&[WindowRange {
        offset: 1,
        len: GRANULE,
    }]);
    other.give_back(&[WindowRange {
        offset: u64::MAX,
        len: u64::MAX,
    }]);
    // It is still served, and the owner still has everything.
    assert_eq!(total(&other.lease(1).0), GRANULE);
    let status = rig.status();
    assert_eq!(status.capacity.leased, 5 * GRANULE);
    assert_eq!(status.counters.malformed, 3);
}

#[test]
fn kill_9_gives_all_leases_back_wiped_within_a_second() {
    let rig = Rig::new(&[64, 64]);
    let socket = rig.socket();
    let mut child = Forked::run(|| match lease_and_scribble(&socket, 128) {
        Some(kept) => {
            mem::forget(kept);
            1
        }
        None => 0,
    });
    assert_eq!(child.answer(), 1);
    assert_eq!(rig.status().capacity.leased, 128 * GRANULE);
    let started = Instant::now();
    child.kill();
    rig.until(Duration::from_secs(1), |status| {
        status.clients.is_empty() && status.capacity.clean == 128 * GRANULE
    });
    println!("back and wiped after {:?}", started.elapsed());
    let next = rig.client();
    let (ranges, exhausted) = next.lease(128);
    assert_eq!((total(&ranges), exhausted), (128 * GRANULE, false));
    assert!(is_zero(next.memory(), &ranges));
}

#[test]
fn a_lease_outlives_the_socket_and_ends_with_the_mapping() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    client.lease(8);
    drop(client.broker);
    // What other tests fork at this moment has the socket, and the page, as well.
    rig.until(PATIENCE, |status| !status.clients[0].connected);
    thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.status().capacity.leased, 8 * GRANULE);
    drop(client.welcome.page);
    rig.until(PATIENCE, |status| {
        status.capacity.leased == 0 && status.clients.is_empty()
    });
}

#[test]
fn a_child_that_still_maps_the_page_keeps_its_dead_parents_lease() {
    let rig = Rig::new(&[8]);
    let socket = rig.socket();
    let (mut pid_of_child, pid_sender) = std::io::pipe().unwrap();
    let mut parent = Forked::run(|| {
        let Some((broker, welcome)) = lease_and_scribble(&socket, 8) else {
            return 0;
        };
        let page: *const _ = &*welcome.page;
        // SAFETY: undoes, for this page, what keeps it from children; then a
        // child that touches nothing and waits to be killed.
        let child = unsafe {
            libc::madvise(page as *mut libc::c_void, PAGE_SIZE, libc::MADV_DOFORK);
            libc::fork()
        };
        if child == 0 {
            // SAFETY: waits for a signal, which comes even if the test fails.
            unsafe {
                libc::alarm(LIFETIME);
                loop {
                    libc::pause();
                }
            }
        }
        let sent = rustix::io::write(&pid_sender, &child.to_ne_bytes());
        mem::forget((broker, welcome));
        u8::from(sent == Ok(4))
    });
    assert_eq!(parent.answer(), 1);
    let mut pid = [0; 4];
    std::io::Read::read_exact(&mut pid_of_child, &mut pid).unwrap();
    drop(parent);
    // The child also holds the socket open: neither that nor its parent's
    // death says anything about the memory.
    thread::sleep(Duration::from_millis(300));
    assert_eq!(rig.status().capacity.leased, 8 * GRANULE);
    // SAFETY: the orphaned child, which waits for this.
    unsafe { libc::kill(i32::from_ne_bytes(pid), libc::SIGKILL) };
    rig.until(Duration::from_secs(2), |status| status.capacity.leased == 0);
}

#[test]
fn what_a_dead_client_counted_is_still_known() {
    use dax_backend::broker::admin::{AdminReply, AdminRequest};
    use std::sync::atomic::Ordering;

    let rig = Rig::new(&[8]);
    let socket = rig.socket();
    let run = uuid::Uuid::from_u128(0x1234);
    for live in [100, 300] {
        let connected = dax_backend::broker::BrokerClient::connect(&socket, run.as_u128());
        let (broker, welcome) = connected.unwrap();
        welcome.page.extent_live_peak.store(live, Ordering::Relaxed);
        welcome
            .page
            .heap_live_peak_total
            .store(live, Ordering::Relaxed);
        welcome
            .page
            .extent_share_at_peak
            .store(5_000, Ordering::Relaxed);
        drop((broker, welcome));
        rig.until(Duration::from_secs(1), |status| status.clients.is_empty());
    }
    let AdminReply::Run(report) = rig.ask(&AdminRequest::Run { run }).unwrap() else {
        panic!("no report");
    };
    assert_eq!((report.processes_total, report.processes_live), (2, 0));
    assert_eq!(report.total.extent_live_peak, 400);
    assert_eq!(report.total.share_on_extents(), Some(0.5));
    assert_eq!(report.processes.len(), 2);
}

#[test]
fn who_asks_and_never_reads_is_cut_off() {
    let rig = Rig::new(&[8]);
    let client = rig.client();
    let (held, _) = client.lease(4);
    let cut_off = (0..20_000).find_map(|_| client.broker.request_lease(0).err());
    assert!(cut_off.is_some(), "answers pile up");
    let status = rig.until(PATIENCE, |status| !status.clients[0].connected);
    assert_eq!(status.clients[0].leased, 4 * GRANULE);
    // It may come back.
    let (id, page) = (client.welcome.client_id, &client.welcome.page);
    let back = BrokerClient::rejoin(&rig.socket(), id, page, held.into_iter());
    assert!(back.is_ok(), "{back:?}");
}

/// Has the page whose client says that it is `pid` take no seal any more: the
/// broker, which has it, is in this process.
fn bar_seals(pid: u64) {
    let at = offset_of!(ClientPage, pid) as u64;
    for entry in fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let name = fs::read_link(entry.path()).unwrap_or_default();
        if !name.starts_with("/memfd:dcmalloc-client (deleted)") {
            continue;
        }
        let opened = fs::File::options()
            .read(true)
            .write(true)
            .open(entry.path());
        let Ok(page) = opened else {
            continue;
        };
        let mut word = [0; 8];
        page.read_exact_at(&mut word, at).unwrap();
        if u64::from_ne_bytes(word) == pid {
            return fcntl_add_seals(&page, SealFlags::SEAL).unwrap();
        }
    }
    panic!("no page of {pid}");
}

/// The kernel does not say any more who maps it.
#[test]
fn a_page_without_seals_lasts_as_long_as_the_process() {
    let mut rig = Rig::new(&[16]);
    let socket = rig.socket();
    let program = || {
        let mut program = Forked::run(|| match lease_and_scribble(&socket, 4) {
            Some((broker, welcome)) => {
                let pid = u64::from(std::process::id());
                welcome.page.pid.store(pid, Ordering::Relaxed);
                mem::forget((broker, welcome));
                1
            }
            None => 0,
        });
        assert_eq!(program.answer(), 1);
        bar_seals(program.pid as u64);
        program
    };
    let (first, second) = (program(), program());
    // One that lives, and has closed everything.
    let client = rig.client();
    client.lease(4);
    client.welcome.page.pid.store(77, Ordering::Relaxed);
    bar_seals(77);
    drop(client.broker);
    first.kill();
    rig.until(PATIENCE, |status| status.capacity.leased == 8 * GRANULE);
    // The next broker knows them by their pages alone.
    rig.restart(|_| second.kill());
    rig.until(PATIENCE, |status| status.capacity.leased == 4 * GRANULE);
    thread::sleep(Duration::from_millis(400));
    assert_eq!(rig.status().capacity.leased, 4 * GRANULE);
}
