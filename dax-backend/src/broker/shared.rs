//! A process's mapping of shared capacity: read-only, all extents of one tag, in
//! the order of their sequence numbers.
//!
//! Unlike a heap's connection this is made by a program that asks for it, once
//! and outside of `malloc`; the socket is closed again before anything is read.
//! From then on the page alone says that the mapping is there.

use std::ffi::CStr;
use std::fmt;
use std::os::fd::OwnedFd;
use std::ptr::{self, NonNull};

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use thiserror::Error;

use super::client::{BrokerClient, ClientError, ConnectError};
use super::client_page::ClientPageMapping;
use super::protocol::{GRANULE, Kind, Message, SHARED_LAST, SharedCode, WindowRange};
use super::socket::Descriptors;
use crate::extent::ExtentTag;

/// Why shared capacity could not be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SharedOpenError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The broker refused.
    #[error("{0}")]
    Refused(SharedCode),
    /// The kernel refused a mapping.
    #[error("mapping the shared capacity failed: {0}")]
    Map(Errno),
}

impl From<ClientError> for SharedOpenError {
    fn from(error: ClientError) -> Self {
        Self::Connect(error.into())
    }
}

/// Shared extents, mapped. Forked children inherit the mapping, and with it the
/// right to it. Dropping it unmaps them in this process.
pub struct SharedMapping {
    data: NonNull<u8>,
    len: usize,
    /// Unmapped after the data: it is what the broker goes by.
    page: ClientPageMapping,
}

// SAFETY: the mapping is only read, and stays until drop.
unsafe impl Send for SharedMapping {}
// SAFETY: as above.
unsafe impl Sync for SharedMapping {}

impl SharedMapping {
    /// Maps the capacity with `tag` that the broker at `path` has. `run_id` as
    /// for [`BrokerClient::connect`].
    ///
    /// # Errors
    /// No broker, a tag that is not there or not shared, no addresses; nothing
    /// is mapped then.
    pub fn open(path: &CStr, run_id: u128, tag: ExtentTag) -> Result<Self, SharedOpenError> {
        let client = BrokerClient::connect_reader(path, run_id)?;
        client.send(&Message::new(Kind::OpenShared).with_tag(tag), &[])?;
        let mut opened: Option<Opening> = None;
        loop {
            let mut fds = Descriptors::default();
            let message = client.patiently(&mut fds)?;
            match message.kind() {
                Some(Kind::Shared) => {}
                Some(Kind::SharedRefused) => {
                    return Err(SharedOpenError::Refused(SharedCode::from_wire(
                        message.arg(0),
                    )));
                }
                _ => return Err(ClientError::Unexpected.into()),
            }
            let opening = match &mut opened {
                Some(opening) => opening,
                None => opened.insert(Opening::new(&message, fds)?),
            };
            for range in message.ranges().as_slice() {
                opening.map(*range)?;
            }
            if message.flags() & SHARED_LAST != 0 {
                break;
            }
        }
        match opened {
            Some(opening) if opening.at == opening.mapping.len => Ok(opening.mapping),
            _ => Err(ConnectError::Welcome.into()),
        }
    }

    /// The mapped bytes: readable, never writable, and valid until drop.
    pub fn bytes(&self) -> NonNull<[u8]> {
        NonNull::slice_from_raw_parts(self.data, self.len)
    }

    /// Whether the device has taken the capacity by force: what is read since
    /// then means nothing.
    pub fn is_lost(&self) -> bool {
        self.page.is_lost()
    }
}

impl fmt::Debug for SharedMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMapping")
            .field("len", &self.len)
            .field("is_lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

impl Drop for SharedMapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `Opening`, and nobody borrows it any more.
        let _ = unsafe { munmap(self.data.as_ptr().cast(), self.len) };
    }
}

/// A mapping that is being made.
struct Opening {
    mapping: SharedMapping,
    window: OwnedFd,
    base: u64,
    /// Bytes that are mapped already.
    at: usize,
}

impl Opening {
    fn new(message: &Message, fds: Descriptors) -> Result<Self, SharedOpenError> {
        let [Some(window), Some(page), _] = fds.0 else {
            return Err(ConnectError::Welcome.into());
        };
        let len = message.arg(0) as usize;
        if len == 0 || !message.arg(0).is_multiple_of(GRANULE) {
            return Err(ConnectError::Welcome.into());
        }
        // Before the data, so that the broker never sees one without the other.
        let page = ClientPageMapping::map_inherited(page)
            .map_err(|errno| SharedOpenError::Connect(ConnectError::Page(errno)))?;
        let data = reserve(len).map_err(SharedOpenError::Map)?;
        Ok(Self {
            mapping: SharedMapping { data, len, page },
            window,
            base: message.arg(3),
            at: 0,
        })
    }

    fn map(&mut self, range: WindowRange) -> Result<(), SharedOpenError> {
        let len = range.len as usize;
        if len == 0 || len > self.mapping.len - self.at {
            return Err(ConnectError::Welcome.into());
        }
        // SAFETY: inside the reservation of this mapping, which nobody has seen.
        unsafe {
            mmap(
                self.mapping.data.as_ptr().add(self.at).cast(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::FIXED,
                &self.window,
                self.base + range.offset,
            )
        }
        .map_err(SharedOpenError::Map)?;
        self.at += len;
        Ok(())
    }
}

/// `len` bytes of addresses, aligned so that the kernel can map 2 MiB with one entry.
fn reserve(len: usize) -> Result<NonNull<u8>, Errno> {
    let align = GRANULE as usize;
    let all = len.checked_add(align).ok_or(Errno::NOMEM)?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let raw = unsafe { mmap_anonymous(ptr::null_mut(), all, ProtFlags::empty(), flags) }?;
    let start = raw.addr().next_multiple_of(align);
    let (before, after) = (start - raw.addr(), raw.addr() + all - (start + len));
    // SAFETY: the ends of the mapping just made, which are not needed.
    unsafe {
        if before > 0 {
            munmap(raw, before)?;
        }
        if after > 0 {
            munmap(raw.byte_add(before + len), after)?;
        }
    }
    NonNull::new(raw.cast::<u8>().wrapping_add(before)).ok_or(Errno::FAULT)
}
