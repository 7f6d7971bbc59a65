//! The broker: connecting, giving back, receipts, statistics.

use core::ffi::{CStr, c_char, c_int};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest, ReleaseTarget};
use dcmalloc::{process, settings};

use crate::arena::lock;
use crate::error::{Error, dcm_status, status, text};
use crate::heap;

/// How much longer than its deadline a release may take to be answered.
const PATIENCE: Duration = Duration::from_secs(10);

static RECEIPT: Mutex<String> = Mutex::new(String::new());

/// Says `conf`, `key:value,…`, before the heap starts. It starts with the first
/// call that makes, attaches, pins, opens, gives back or reads something, and
/// under the preloaded library before `main`. What is said holds over
/// `DCMALLOC_CONF` and the configuration file. One setting that is wrong makes
/// all of it be refused.
///
/// # Safety
/// `conf` is null or a string that ends with a nul.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_configure(conf: *const c_char) -> dcm_status {
    // SAFETY: the caller's promise.
    let conf = unsafe { text(conf, "the settings") };
    status(conf.and_then(configure))
}

pub(crate) fn configure(conf: &str) -> Result<(), Error> {
    settings::check(conf).map_err(|error| Error::Invalid(error.to_string()))?;
    Ok(process::configure(conf)?)
}

/// Connects to the broker that listens at `socket`, or at null to that of
/// `DCM_SOCKET` or of the machine. Without this the heap does so when it starts,
/// unless `placement` is `dram`, and stays in DRAM where that fails. The heap
/// stays with the broker that it found first.
///
/// # Safety
/// `socket` is null or a string that ends with a nul.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_attach(socket: *const c_char) -> dcm_status {
    // SAFETY: the caller's promise.
    let socket = (!socket.is_null()).then(|| unsafe { CStr::from_ptr(socket) });
    let attached = process::attach_to(socket);
    status(attached.map_err(|error| match error {
        process::AttachError::Start(error) => Error::Start(error),
        error => Error::Broker(error.to_string()),
    }))
}

/// Gives back what is unused; 1 if there was something.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_trim() -> c_int {
    heap().map_or(0, |heap| c_int::from(heap.trim()))
}

/// Has the broker give `bytes` back to the device, as `dcm release` does: from
/// whoever has them, this process included. Returns when there is a receipt,
/// after about `deadline_ms` at the latest; `dcm_receipt_json` has it. That less came
/// back than was asked for is no error, and in the receipt.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_release(bytes: u64, deadline_ms: u64) -> dcm_status {
    status(release(bytes, deadline_ms))
}

fn release(bytes: u64, deadline_ms: u64) -> Result<(), Error> {
    heap()?;
    let socket = process::broker().ok_or_else(|| {
        let text = "the heap has no broker: call dcm_attach, or start one with `dcm serve`";
        Error::Broker(text.into())
    })?;
    let path = Path::new(OsStr::from_bytes(socket.to_bytes()));
    let refused = |error: dax_backend::broker::admin::AdminError| Error::Broker(error.to_string());
    let broker = AdminClient::connect(path).map_err(refused)?;
    let request = AdminRequest::Release {
        target: ReleaseTarget::Bytes(bytes),
        deadline_ms,
        force: false,
        past_deadline: false,
        progress: false,
    };
    let patience = Duration::from_millis(deadline_ms).saturating_add(PATIENCE);
    let AdminReply::Receipt(receipt) = broker.ask(&request, patience).map_err(refused)? else {
        return Err(Error::Broker("it answered something else".into()));
    };
    let receipt =
        serde_json::to_string(&receipt).map_err(|error| Error::Broker(error.to_string()))?;
    *lock(&RECEIPT) = receipt;
    Ok(())
}

/// Writes the receipt of the last `dcm_release` as JSON and a nul, as far as
/// `size` bytes go; returns its length without the nul, as snprintf(3) does.
///
/// # Safety
/// `size` bytes can be written at `buffer`, which may be null if `size` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_receipt_json(buffer: *mut c_char, size: usize) -> usize {
    // SAFETY: the caller's promise.
    unsafe { write_text(&lock(&RECEIPT), buffer, size) }
}

/// Writes what the heap holds as JSON and a nul; as `dcm_receipt_json`. The
/// same numbers are under `stats.` of `dcm_ctl`.
///
/// # Safety
/// As `dcm_receipt_json`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_stats_json(buffer: *mut c_char, size: usize) -> usize {
    let stats = heap().map(|heap| heap.stats()).unwrap_or_default();
    let text = serde_json::to_string(&stats).unwrap_or_default();
    // SAFETY: the caller's promise.
    unsafe { write_text(&text, buffer, size) }
}

/// # Safety
/// As `dcm_receipt_json`.
unsafe fn write_text(text: &str, buffer: *mut c_char, size: usize) -> usize {
    if !buffer.is_null() && size > 0 {
        let n = text.len().min(size - 1);
        // SAFETY: the caller's promise, and `n` is less than `size`.
        unsafe {
            buffer
                .cast::<u8>()
                .copy_from_nonoverlapping(text.as_ptr(), n);
            buffer.add(n).write(0);
        }
    }
    text.len()
}
