//! What comes from the terminal, and that it is gone.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, IsTerminal, stdin};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use ratatui::crossterm::event::{self, Event};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Why there is nothing to show anything on.
pub(super) const GONE: &str = "the terminal is gone";

/// Reads keys on a thread, and has another watch the terminal: crossterm asks a terminal that hung up for
/// its next key for ever.
pub(super) fn listen() -> io::Result<Receiver<io::Result<Event>>> {
    // The same that crossterm reads.
    let input: OwnedFd = match stdin() {
        terminal if terminal.is_terminal() => terminal.as_fd().try_clone_to_owned()?,
        _ => File::open("/dev/tty")?.into(),
    };
    let (events, listening) = channel();
    let gone = events.clone();
    thread::spawn(move || {
        let mut fds = [PollFd::new(&input, PollFlags::empty())];
        let error = loop {
            match poll(&mut fds, None) {
                Ok(_) => break io::Error::other(GONE),
                Err(Errno::INTR) => {}
                Err(errno) => break errno.into(),
            }
        };
        // Nobody listens when the end has come otherwise.
        let _ = gone.send(Err(error));
    });
    thread::spawn(move || {
        loop {
            let event = event::read();
            let failed = event.is_err();
            if events.send(event).is_err() || failed {
                break;
            }
        }
    });
    Ok(listening)
}
