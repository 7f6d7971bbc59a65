//! Capacity that several hosts share, mapped to be read.

use core::ffi::{c_char, c_int, c_void};
use std::collections::BTreeMap;
use std::sync::Mutex;

use allocator::{Arena, SharedExtents};

use crate::arena::lock;
use crate::error::{Error, dcm_status, status, text};
use crate::heap;

/// What is open, by the address of its first byte.
static OPEN: Mutex<BTreeMap<usize, SharedExtents>> = Mutex::new(BTreeMap::new());

/// Maps the capacity that the fabric manager has given several hosts under
/// `tag`, a UUID: all of its extents or none, in the order of their sequence
/// numbers, read-only. `data` is where it is, `size` how many bytes. Until
/// `dcm_close_shared` a release of it is refused by name, as of a pin.
///
/// Nobody may write it meanwhile, on this host or another: who fills it says
/// when it is done.
///
/// `DCM_NO_TAG`: there is no capacity with this tag here, or it is not shared.
///
/// # Safety
/// `tag` is null or a string that ends with a nul; `data` and `size` are null
/// or can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_open_shared(
    tag: *const c_char,
    data: *mut *const c_void,
    size: *mut usize,
) -> dcm_status {
    if data.is_null() || size.is_null() {
        return status(Err(Error::Null("the place for the address or the size")));
    }
    // SAFETY: the caller's promise.
    let opened = unsafe { open(tag) };
    status(opened.map(|(at, len)| {
        // SAFETY: not null, and the caller's.
        unsafe {
            *data = core::ptr::with_exposed_provenance(at);
            *size = len;
        }
    }))
}

/// # Safety
/// As `dcm_open_shared`.
unsafe fn open(tag: *const c_char) -> Result<(usize, usize), Error> {
    // SAFETY: the caller's promise.
    let tag = unsafe { text(tag, "the tag") }?.parse()?;
    heap()?;
    // SAFETY: the caller's promise, by the words of `dcm_open_shared`.
    let extents = unsafe { Arena::open_shared(tag) }?;
    let (at, len) = (extents.as_ptr().expose_provenance(), extents.len());
    lock(&OPEN).insert(at, extents);
    Ok((at, len))
}

/// Unmaps what `dcm_open_shared` mapped at `data`; null does nothing.
///
/// `DCM_NO_TAG`: nothing is open there; it has been closed, or never was.
///
/// # Safety
/// No thread reads it any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_close_shared(data: *const c_void) -> dcm_status {
    if data.is_null() {
        return dcm_status::DCM_OK;
    }
    let closed = lock(&OPEN).remove(&data.addr());
    status(closed.map(drop).ok_or(Error::NotShared(data.addr())))
}

/// Whether the device has taken what is open at `data` by force: what is read
/// since then means nothing. 1 if so, 0 if not or if nothing is open there.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_shared_is_lost(data: *const c_void) -> c_int {
    let open = lock(&OPEN);
    let lost = open.get(&data.addr()).is_some_and(SharedExtents::is_lost);
    c_int::from(lost)
}
