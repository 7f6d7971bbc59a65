//! `dcm top` on a terminal of this test's.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Child, Stdio};
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

use crate::call::Dcm;

const LIMIT: Duration = Duration::from_secs(60);

/// Both ends of a terminal of 100 columns: its keyboard and screen, and what programs get.
fn terminal() -> (File, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let size = libc::winsize {
        ws_row: 30,
        ws_col: 100,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: two descriptors are written, the name and settings are left out, the size is read.
    let made =
        unsafe { libc::openpty(&mut ours, &mut theirs, ptr::null_mut(), ptr::null(), &size) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: both are new, and nobody else's. Programs shall not inherit the one that is ours.
    unsafe {
        assert_eq!(libc::fcntl(ours, libc::F_SETFD, libc::FD_CLOEXEC), 0);
        (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs))
    }
}

/// `dcm top`, once it has drawn; without `stderr`, its messages are for the terminal too.
fn top(dcm: &Dcm, stderr: Option<Stdio>) -> (File, Child) {
    let (mut ours, theirs) = terminal();
    let child = dcm
        .command(&["top"])
        .stdin(theirs.try_clone().unwrap())
        .stdout(theirs.try_clone().unwrap())
        .stderr(stderr.unwrap_or(theirs.into()))
        .spawn()
        .unwrap();
    let mut screen = Vec::new();
    while !String::from_utf8_lossy(&screen).contains("extents") {
        let mut bytes = [0; 4096];
        let read = ours.read(&mut bytes).unwrap();
        screen.extend(&bytes[..read]);
    }
    (ours, child)
}

fn ended(mut child: Child) -> (Option<i32>, String) {
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("dcm top runs on");
        }
        thread::sleep(Duration::from_millis(10));
    };
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said).unwrap();
    }
    (status.code(), said)
}

#[test]
fn a_key_ends_it() {
    let dcm = Dcm::new();
    let _server = dcm.serve(&["--emulate", "64M"]);
    let (mut terminal, child) = top(&dcm, Some(Stdio::piped()));
    terminal.write_all(b"q").unwrap();
    assert_eq!(ended(child), (Some(0), String::new()));
}

/// It once asked a terminal that was gone for keys as fast as it could, for ever: whoever ignores SIGHUP, or
/// has no controlling terminal, is not ended by the kernel.
#[test]
fn it_ends_when_its_terminal_is_gone() {
    let dcm = Dcm::new();
    let _server = dcm.serve(&["--emulate", "64M"]);
    let (terminal, child) = top(&dcm, Some(Stdio::piped()));
    drop(terminal);
    let (code, said) = ended(child);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.starts_with("dcm: the terminal is gone"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// With nobody left to tell why.
#[test]
fn it_ends_when_its_messages_were_for_the_terminal_too() {
    let dcm = Dcm::new();
    let _server = dcm.serve(&["--emulate", "64M"]);
    let (terminal, child) = top(&dcm, None);
    drop(terminal);
    assert_eq!(ended(child).0, Some(1));
}
