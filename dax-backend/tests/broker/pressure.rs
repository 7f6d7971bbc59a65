//! The host is short of DRAM: its clients hear so.

use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use dax_backend::broker::FromBroker;
use rustix::net::{SendFlags, send};

use crate::rig::{PATIENCE, Rig, Setup};

/// Out-of-band data is what makes a socket ready as a trigger of the kernel is.
fn press(trigger: &UnixStream) {
    send(trigger, b"!", SendFlags::OOB).unwrap();
}

#[test]
fn pressure_on_dram_reaches_every_client_now_and_then() {
    let (trigger, heard) = UnixStream::pair().unwrap();
    let rig = Rig::with(Setup {
        pressure: Some(heard.into()),
        ..Setup::default()
    });
    let clients = [rig.client(), rig.client()];
    assert_eq!(rig.status().pressure.missing, None);
    assert_eq!(rig.status().pressure.seen, 0);
    press(&trigger);
    for client in &clients {
        assert!(matches!(client.next(), FromBroker::DramShort));
    }
    // It lasts, and is not said more often than anybody can do something.
    thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.status().pressure.seen, 1);
    rig.until(PATIENCE, |status| status.pressure.seen >= 2);
}

#[test]
fn a_trigger_that_ends_is_said_to_be_missing() {
    let (trigger, heard) = UnixStream::pair().unwrap();
    let rig = Rig::with(Setup {
        pressure: Some(heard.into()),
        ..Setup::default()
    });
    drop(trigger);
    let status = rig.until(PATIENCE, |status| status.pressure.missing.is_some());
    assert_eq!(status.pressure.seen, 0);
}

#[test]
fn this_machine_is_watched_or_said_why_not() {
    let rig = Rig::new(&[8]);
    match rig.status().pressure.missing {
        None => {}
        Some(why) => {
            assert!(why.contains("/proc/pressure/memory"), "{why}");
            println!("SKIPPED: {why}");
        }
    }
}
