//! Started by systemd: the socket it listens at for us, and telling it that we serve
//! (sd_listen_fds(3), sd_notify(3)).

use std::env;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use dax_backend::broker::Listener;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, getsockname, sockopt};

/// The first descriptor that is handed over (SD_LISTEN_FDS_START).
const FIRST: i32 = 3;

/// The socket that this process was started with, if it was; once.
pub(crate) fn listener() -> anyhow::Result<Option<Listener>> {
    let number = |name| env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    match number("LISTEN_FDS") {
        None | Some(0) => return Ok(None),
        Some(1) => {}
        Some(more) => bail!("systemd hands over {more} sockets: the unit is to name one"),
    }
    // SAFETY: whoever set LISTEN_PID to this process opened it for us, and
    // `serve` asks once.
    let socket = unsafe { OwnedFd::from_raw_fd(FIRST) };
    fcntl_setfd(&socket, FdFlags::CLOEXEC).context("LISTEN_FDS names no descriptor")?;
    ensure!(
        sockopt::socket_domain(&socket).ok() == Some(AddressFamily::UNIX)
            && sockopt::socket_type(&socket).ok() == Some(SocketType::SEQPACKET),
        "the socket that systemd hands over is none for a broker: ListenSequentialPacket=PATH"
    );
    fcntl_setfl(&socket, fcntl_getfl(&socket)? | OFlags::NONBLOCK)?;
    let path = path_of(&socket).context("the socket that systemd hands over has no path")?;
    Ok(Some(Listener::inherited(socket, &path)))
}

/// Where a socket listens.
pub(crate) fn path_of(socket: impl AsFd) -> Option<PathBuf> {
    let address = SocketAddrUnix::try_from(getsockname(socket).ok()?).ok()?;
    let path = address.path()?;
    Some(std::ffi::OsStr::from_bytes(path.to_bytes()).into())
}

/// Tells systemd, if it wants to know, that programs can connect.
pub(crate) fn notify_ready() {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    if let (Ok(address), Ok(socket)) = (address, UnixDatagram::unbound()) {
        // It gives up on us in time by itself.
        let _ = socket.send_to_addr(b"READY=1", &address);
    }
}
