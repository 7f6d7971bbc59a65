//! The broker's socket in the file system: bind, take over, remove.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen,
    socket_with,
};
use thiserror::Error;

/// Why the broker has no socket.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Somebody serves there already.
    #[error("a broker is already serving at {path}: stop it, or choose another --socket")]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket is in the way; it is left alone.
    #[error("{path} exists and is no socket: remove it, or choose another --socket")]
    NotASocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// A socket of another user is in the way; whoever owns it may be about to serve.
    #[error("{path} belongs to user {uid}: remove it, or choose another --socket")]
    Foreign {
        /// The socket.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// The path does not fit into a socket address.
    #[error("{path} is longer than the 107 bytes of a unix socket's path")]
    TooLong {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot make the socket {path}")]
    System {
        /// The path.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// A listening socket; its file goes when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode, so that a successor's file is not removed; `None` if
    /// it is somebody else's to remove.
    file: Option<(u64, u64)>,
}

impl Listener {
    /// Listens at `path`. Missing directories are made; the socket of a broker
    /// that died is replaced, that of one that lives is not. `open_to_all`
    /// lets every user connect: whom the broker admits is decided by
    /// credentials, not by the file's mode.
    pub fn bind(path: &Path, open_to_all: bool) -> Result<Self, ListenError> {
        let system = |source: io::Error| ListenError::System {
            path: path.into(),
            source,
        };
        let address =
            SocketAddrUnix::new(path).map_err(|_| ListenError::TooLong { path: path.into() })?;
        if let Some(directory) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            let mode = if open_to_all { 0o755 } else { 0o700 };
            let mut builder = DirBuilder::new();
            builder
                .recursive(true)
                .mode(mode)
                .create(directory)
                .map_err(system)?;
        }
        clear_stale(path, &address)?;
        let socket = seqpacket().map_err(|errno| system(errno.into()))?;
        match bind(&socket, &address) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => return Err(ListenError::Busy { path: path.into() }),
            Err(errno) => return Err(system(errno.into())),
        }
        let mode = if open_to_all { 0o666 } else { 0o600 };
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(system)?;
        let file = fs::symlink_metadata(path).map_err(system)?;
        listen(&socket, 128).map_err(|errno| system(errno.into()))?;
        Ok(Self {
            socket,
            path: path.into(),
            file: Some((file.dev(), file.ino())),
        })
    }

    /// A socket that somebody else has bound to `path`, and listens at.
    pub fn inherited(socket: OwnedFd, path: &Path) -> Self {
        Self {
            socket,
            path: path.into(),
            file: None,
        }
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next connection, if there is one.
    pub(super) fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|file| Some((file.dev(), file.ino())) == self.file);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn seqpacket() -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

/// Removes the socket of a broker that is gone.
fn clear_stale(path: &Path, address: &SocketAddrUnix) -> Result<(), ListenError> {
    let system = |source| ListenError::System {
        path: path.into(),
        source,
    };
    let file = match fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system(error)),
    };
    if !file.file_type().is_socket() {
        return Err(ListenError::NotASocket { path: path.into() });
    }
    let own = rustix::process::geteuid().as_raw();
    if file.uid() != own {
        return Err(ListenError::Foreign {
            path: path.into(),
            uid: file.uid(),
        });
    }
    let probe = seqpacket().map_err(|errno| system(errno.into()))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(system),
        _ => Err(ListenError::Busy { path: path.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_brokers_socket_is_replaced_and_a_living_ones_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/broker.sock");
        let first = Listener::bind(&path, false).unwrap();
        assert!(matches!(
            Listener::bind(&path, false),
            Err(ListenError::Busy { .. })
        ));
        drop(first);
        assert!(!path.exists());
        // A broker that was killed leaves its file behind.
        let stale = dir.path().join("stale.sock");
        let socket = seqpacket().unwrap();
        bind(&socket, &SocketAddrUnix::new(&stale).unwrap()).unwrap();
        drop(socket);
        let second = Listener::bind(&stale, false).unwrap();
        assert_eq!(second.path(), stale);
        drop(second);
        assert!(!stale.exists());
    }

    #[test]
    fn a_file_in_the_way_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(
            Listener::bind(&path, false),
            Err(ListenError::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }
}
