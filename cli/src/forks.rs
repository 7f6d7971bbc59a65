//! Fork servers: a process for each program whose children share its extents.
//! It outlives the broker that started it, because nobody else has what those
//! children have not touched yet.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::Context;
use clap::Args;
use dax_backend::broker::{ForkFamily, StoreSocket};

use crate::failure::Failure;
use crate::serve::raise_descriptor_limit;

/// What the broker says of the window.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where it starts in its file
    base: u64,
    /// Its length in bytes
    len: u64,
}

/// Starts a fork server.
pub(crate) fn start(family: ForkFamily) -> io::Result<()> {
    let (ours, theirs) = StoreSocket::pair()?;
    let mut server = Command::new("/proc/self/exe")
        .arg0("dcm")
        .arg("serve-forks")
        .args([family.base.to_string(), family.len.to_string()])
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
    let family = ForkFamily::receive(socket, options.base, options.len);
    let family = family.context("this is for brokers to start")?;
    family.serve().context("cannot map the window")?;
    Ok(())
}
