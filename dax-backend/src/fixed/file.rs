//! Opening memory by its path: `/dev/daxX.Y`, or a file on hugetlbfs, tmpfs or a DAX file system.

#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, major, minor};
use rustix::io::Errno;
use thiserror::Error;

use crate::broker::GRANULE;

/// Memory that was opened, and that nobody else serves.
#[derive(Debug)]
pub struct MemoryFile {
    /// To be mapped from its start.
    pub fd: OwnedFd,
    /// Bytes, a multiple of 2 MiB.
    pub len: u64,
    /// Whether it is a device, and not a file.
    pub is_device: bool,
}

/// Why memory can't be served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// It can't be opened.
    #[error("{path} cannot be opened: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// `open` says ENXIO: no driver has the device.
    #[error(
        "{path} has no driver: as root, echo {name} > /sys/bus/dax/drivers/device_dax/bind \
         (or daxctl reconfigure-device --mode=devdax {name})"
    )]
    NoDriver {
        /// The device's node.
        path: PathBuf,
        /// Its name, such as `dax0.0`.
        name: String,
    },
    /// Neither a DAX device nor a file.
    #[error(
        "{path} is no memory: give a /dev/daxX.Y, or a file on hugetlbfs, tmpfs or a DAX file system"
    )]
    NotMemory {
        /// What was given.
        path: PathBuf,
    },
    /// There is not even one granule.
    #[error("{path} has {len} bytes; the smallest that can be served are 2 MiB")]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its bytes.
        len: u64,
    },
    /// It can't be mapped in granules.
    #[error(
        "{path} maps in units of {align} bytes, and granules have 2 MiB: \
         daxctl reconfigure-device --align=2M"
    )]
    Align {
        /// The device's node.
        path: PathBuf,
        /// Bytes that mappings are multiples of.
        align: u64,
    },
    /// A broker has it, or programs of one that has died.
    #[error(
        "{path} is in use: end the broker that serves it or, if that has died, the programs that \
         still map it"
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
}

/// Opens `path` for a broker, and keeps others from serving it for as long as it is open
/// (flock(2)).
///
/// # Errors
/// See [`FileError`].
pub fn open(path: &Path) -> Result<MemoryFile, FileError> {
    let path_buf = || path.to_path_buf();
    let opened = OpenOptions::new().read(true).write(true).open(path);
    let file = opened.map_err(|source| match source.raw_os_error() {
        Some(libc::ENXIO) => FileError::NoDriver {
            name: name_of(path),
            path: path_buf(),
        },
        Some(libc::EISDIR) => FileError::NotMemory { path: path_buf() },
        _ => FileError::Open {
            path: path_buf(),
            source,
        },
    })?;
    let (len, align, is_device) = shape(&file, path)?;
    if align > GRANULE {
        return Err(FileError::Align {
            path: path_buf(),
            align,
        });
    }
    if len < GRANULE {
        return Err(FileError::TooSmall {
            path: path_buf(),
            len,
        });
    }
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(MemoryFile {
            fd: file.into(),
            len: len - len % GRANULE,
            is_device,
        }),
        Err(Errno::WOULDBLOCK) => Err(FileError::InUse { path: path_buf() }),
        Err(errno) => Err(FileError::Open {
            path: path_buf(),
            source: errno.into(),
        }),
    }
}

/// Length, unit of mapping, and whether it is a device.
fn shape(file: &File, path: &Path) -> Result<(u64, u64, bool), FileError> {
    let open_failed = |source| FileError::Open {
        path: path.to_path_buf(),
        source,
    };
    let metadata = file.metadata().map_err(open_failed)?;
    if metadata.is_file() {
        return Ok((metadata.len(), 1, false));
    }
    let not_memory = || FileError::NotMemory {
        path: path.to_path_buf(),
    };
    if !metadata.file_type().is_char_device() {
        return Err(not_memory());
    }
    let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
    let directory = PathBuf::from(format!("/sys/dev/char/{major}:{minor}"));
    let is_dax = fs::canonicalize(directory.join("subsystem"))
        .is_ok_and(|bus| bus.file_name().is_some_and(|name| name == "dax"));
    if !is_dax {
        return Err(not_memory());
    }
    let number = |attribute: &str| {
        let text = fs::read_to_string(directory.join(attribute)).map_err(open_failed)?;
        let number = text.trim().parse();
        number.map_err(|_| open_failed(io::ErrorKind::InvalidData.into()))
    };
    Ok((number("size")?, number("align")?, true))
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(len: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(len).unwrap();
        file
    }

    #[test]
    fn a_file_is_served_in_whole_granules_and_by_one() {
        let file = file(2 * GRANULE + 4096);
        let memory = open(file.path()).unwrap();
        assert_eq!(memory.len, 2 * GRANULE);
        assert!(!memory.is_device);
        let second = open(file.path()).unwrap_err();
        assert!(matches!(second, FileError::InUse { .. }), "{second}");
        drop(memory);
        open(file.path()).unwrap();
    }

    #[test]
    fn what_is_no_memory_is_told_apart() {
        let small = open(file(4096).path()).unwrap_err();
        assert!(
            matches!(small, FileError::TooSmall { len: 4096, .. }),
            "{small}"
        );
        let zero = open(Path::new("/dev/zero")).unwrap_err();
        assert!(matches!(zero, FileError::NotMemory { .. }), "{zero}");
        let directory = open(Path::new("/")).unwrap_err();
        assert!(
            matches!(directory, FileError::NotMemory { .. }),
            "{directory}"
        );
        let missing = open(Path::new("/dev/dax99.0")).unwrap_err();
        assert!(matches!(missing, FileError::Open { .. }), "{missing}");
    }
}
