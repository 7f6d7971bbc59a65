//! Pins: memory that stays where it is while a device works on it.

use core::ffi::c_void;
use std::collections::BTreeMap;
use std::sync::Mutex;

use allocator::PinGuard;

use crate::arena::lock;
use crate::error::{Error, dcm_status, status};
use crate::heap;

/// A pin: a number that no other pin of the process has or will have.
pub type dcm_pin_id = u64;

/// The pins that there are, and the number of the last one.
static PINS: Mutex<(BTreeMap<dcm_pin_id, PinGuard>, u64)> = Mutex::new((BTreeMap::new(), 0));

/// Keeps `len` bytes at `ptr` where they are until `dcm_unpin`: they are not
/// moved, spilled or given back, as it must be while a device reads or writes
/// them by itself. They may be of any arena, or of the preloaded malloc. Pins
/// are counted for each 2 MiB, and may overlap. Waits for a move that is under way.
///
/// `DCM_FOREIGN`: not all of it is in use in this heap.
///
/// # Safety
/// `pin` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_pin(
    ptr: *const c_void,
    len: usize,
    pin: *mut dcm_pin_id,
) -> dcm_status {
    if pin.is_null() {
        return status(Err(Error::Null("the place for the pin")));
    }
    let pinned = || {
        let guard = heap()?.pin(ptr.cast(), len)?;
        let _guard = heap()?.no_fork();
        let (pins, last) = &mut *lock(&PINS);
        *last += 1;
        pins.insert(*last, guard);
        Ok(*last)
    };
    // SAFETY: not null, and the caller's.
    status(pinned().map(|id| unsafe { *pin = id }))
}

/// Ends a pin. `DCM_NO_PIN`: it has ended before, and nothing was done.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_unpin(pin: dcm_pin_id) -> dcm_status {
    let ended = heap().and_then(|heap| {
        let _guard = heap.no_fork();
        lock(&PINS).0.remove(&pin).ok_or(Error::NoPin(pin))
    });
    status(ended.map(drop))
}
