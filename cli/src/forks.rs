//! Fork servers: a process for each program whose children share its extents.
//! It outlives the broker that started it, because nobody else has what those
//! children have not touched yet.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::Context;
use clap::Args;
use dax_backend::broker::{ForkFamily, StoreSocket, guard};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::failure::Failure;
use crate::serve::raise_descriptor_limit;

/// What the broker says of the window.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where it starts in its file
    base: u64,
    /// Its length in bytes
    len: u64,
    /// The client's number
    client: u32,
    /// The address of its page for descendants
    mark: u64,
}

/// Starts a fork server.
pub(crate) fn start(family: ForkFamily) -> io::Result<()> {
    let (ours, theirs) = StoreSocket::pair()?;
    let mut server = Command::new("/proc/self/exe")
        .arg0("dcm")
        .arg("serve-forks")
        .args([family.base, family.len, family.client.into(), family.mark].map(|n| n.to_string()))
        .stdin(theirs.into_fd())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // What ends the broker from a terminal must not end this.
        .process_group(0)
        .spawn()?;
    thread::Builder::new().spawn(move || server.wait())?;
    family.send(&ours)
}

/// Is a fork server; the socket that stdin is has what it needs.
pub(crate) fn serve(options: &Options) -> Result<(), Failure> {
    let socket: OwnedFd = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    let socket = StoreSocket::from_fd(socket);
    raise_descriptor_limit();
    // Its memory is mostly the window's, and is not freed by its end. Without
    // the right to say so it takes its chances.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let window = (options.base, options.len);
    start_guard(options.mark).context("cannot start a process")?;
    let family = ForkFamily::receive(socket, window, (options.client, options.mark));
    let family = family.context("this is for brokers to start")?;
    family.serve().context("cannot map the window")?;
    Ok(())
}

/// Starts a process that shares this one's table of descriptors, so that
/// whatever ends this one closes none of them.
fn start_guard(mark: u64) -> io::Result<()> {
    let server = pidfd_open(getpid(), PidfdFlags::empty())?;
    let flags = libc::c_long::from(libc::CLONE_FILES | libc::SIGCHLD);
    // SAFETY: as fork(2), but for the table; this process has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match pid {
        0 => std::process::exit(match stand_guard(&server, mark) {
            Ok(()) => 0,
            Err(_) => 1,
        }),
        1.. => {
            // The guard has it, too: the table is one.
            std::mem::forget(server);
            Ok(())
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for the end of `server`, and takes over what it has not closed.
fn stand_guard(server: &OwnedFd, mark: u64) -> io::Result<()> {
    rustix::thread::set_name(c"dcm-guard")?;
    let mut ended = [PollFd::new(server, PollFlags::IN)];
    while matches!(poll(&mut ended, None), Ok(0) | Err(rustix::io::Errno::INTR)) {}
    let mut open = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let number = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        if let (Some(number), Ok(what)) = (number, std::fs::read_link(entry.path())) {
            // Not the one that lists them.
            if !what.starts_with("/proc") {
                open.push((number, what.as_os_str() == "anon_inode:[userfaultfd]"));
            }
        }
    }
    let mut held = Vec::new();
    for (number, is_held) in open {
        let number: i32 = number;
        if number > 2 && number != server.as_raw_fd() {
            // SAFETY: the table is this process's alone now, and nothing here
            // has the number; what was closed meanwhile is closed again.
            let fd = unsafe { OwnedFd::from_raw_fd(number) };
            if is_held {
                held.push(fd);
            }
        }
    }
    Ok(guard(held, mark)?)
}
