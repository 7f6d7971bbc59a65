//! Status codes, and the text of a thread's last error.

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char, c_int};
use core::fmt::{self, Write};

use allocator::{ArenaError, PinError, SharedError, TagError};
use dcmalloc::process::StartError;

/// What a call came to. `dcm_last_error` says more.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum dcm_status {
    /// Done.
    DCM_OK = 0,
    /// An argument can't be meant: a null pointer, an alignment that is no
    /// power of two, a size that overflows, a setting that is none.
    DCM_INVALID = 1,
    /// No memory within the limits that hold.
    DCM_NO_MEMORY = 2,
    /// There is no such arena: it has ended, or never was.
    DCM_NO_ARENA = 3,
    /// The memory is not of an arena of this library.
    DCM_FOREIGN = 4,
    /// Nothing has that name.
    DCM_UNKNOWN = 5,
    /// It can be read only, or only be set before the heap has started.
    DCM_READ_ONLY = 6,
    /// The value has another size.
    DCM_SIZE = 7,
    /// There are as many as there can be.
    DCM_TOO_MANY = 8,
    /// No broker, or it refused.
    DCM_BROKER = 9,
    /// Another copy of the library serves this process.
    DCM_SECOND_COPY = 10,
    /// The system refused a thread or addresses.
    DCM_SYSTEM = 11,
    /// There is no such pin: it has ended, or never was.
    DCM_NO_PIN = 12,
    /// There is no shared capacity with this tag, or none is mapped there.
    DCM_NO_TAG = 13,
}

use dcm_status::{
    DCM_BROKER, DCM_FOREIGN, DCM_INVALID, DCM_NO_ARENA, DCM_NO_MEMORY, DCM_NO_PIN, DCM_NO_TAG,
    DCM_OK, DCM_READ_ONLY, DCM_SECOND_COPY, DCM_SIZE, DCM_SYSTEM, DCM_TOO_MANY, DCM_UNKNOWN,
};

/// Why a call was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0} is null")]
    Null(&'static str),
    #[error("{0}")]
    Invalid(String),
    #[error("no memory for {0} bytes within the limits that hold")]
    NoMemory(usize),
    #[error("there is no arena {0:#x}: it has ended, or never was")]
    NoArena(u64),
    #[error("{0:#x} is not memory of an arena: it is another allocator's, or its arena has ended")]
    Foreign(usize),
    #[error("{ptr:#x} is memory of arena {owner:#x}, not of {arena:#x}")]
    OtherArena { ptr: usize, owner: u64, arena: u64 },
    #[error("there is no `{name}`: did you mean `{nearest}`?")]
    Unknown { name: String, nearest: String },
    #[error("`{0}` takes no new value")]
    ReadOnly(String),
    #[error("`{name}` takes {needed} bytes, not {given}")]
    Size {
        name: String,
        needed: usize,
        given: usize,
    },
    #[error("there is no pin {0}: it has ended, or never was")]
    NoPin(u64),
    #[error(transparent)]
    Tag(#[from] TagError),
    #[error(transparent)]
    Shared(#[from] SharedError),
    #[error("no shared capacity is mapped at {0:#x}: it has been closed, or never was")]
    NotShared(usize),
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("{0}")]
    Broker(String),
}

impl Error {
    fn status(&self) -> dcm_status {
        match self {
            Self::Null(_) | Self::Invalid(_) => DCM_INVALID,
            Self::NoMemory(_) => DCM_NO_MEMORY,
            Self::NoArena(_) => DCM_NO_ARENA,
            Self::Foreign(_) | Self::OtherArena { .. } => DCM_FOREIGN,
            Self::Unknown { .. } => DCM_UNKNOWN,
            Self::ReadOnly(_) => DCM_READ_ONLY,
            Self::Size { .. } => DCM_SIZE,
            Self::NoPin(_) => DCM_NO_PIN,
            Self::Tag(_) => DCM_INVALID,
            Self::Shared(SharedError::Refused(_)) | Self::NotShared(_) => DCM_NO_TAG,
            Self::Shared(_) => DCM_BROKER,
            Self::Pin(PinError::Empty) => DCM_INVALID,
            Self::Pin(PinError::Foreign { .. }) => DCM_FOREIGN,
            Self::Pin(PinError::TooMany) => DCM_TOO_MANY,
            Self::Pin(_) => DCM_NO_MEMORY,
            Self::Arena(ArenaError::TooMany | ArenaError::Tags) => DCM_TOO_MANY,
            Self::Arena(ArenaError::Engine) => DCM_NO_MEMORY,
            Self::Arena(ArenaError::NoSpace | ArenaError::Thread(_)) => DCM_SYSTEM,
            Self::Arena(_) => DCM_INVALID,
            Self::Start(StartError::SecondCopy) => DCM_SECOND_COPY,
            Self::Start(StartError::Started) => DCM_READ_ONLY,
            Self::Start(_) => DCM_SYSTEM,
            Self::Broker(_) => DCM_BROKER,
        }
    }
}

/// The text of the last error of a thread, without a destructor and without a
/// heap: out of memory is one of the things it has to say.
struct Last(UnsafeCell<[u8; Last::LEN]>);

impl Last {
    const LEN: usize = 512;
}

thread_local! {
    static LAST: Last = const { Last(UnsafeCell::new([0; Last::LEN])) };
}

struct Line<'a> {
    text: &'a mut [u8],
    len: usize,
}

impl Write for Line<'_> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        // The last byte stays 0.
        let room = self.text.len() - 1 - self.len;
        let n = s.floor_char_boundary(room);
        self.text[self.len..][..n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        Ok(())
    }
}

/// Keeps the error's text for `dcm_last_error`; its status.
fn keep(error: &Error) -> dcm_status {
    LAST.with(|last| {
        // SAFETY: this thread's, and nothing below comes back here.
        let text = unsafe { &mut *last.0.get() };
        text.fill(0);
        let _ = write!(Line { text, len: 0 }, "{error}");
    });
    error.status()
}

/// The status of a call, its error kept.
pub(crate) fn status(result: Result<(), Error>) -> dcm_status {
    match result {
        Ok(()) => DCM_OK,
        Err(error) => keep(&error),
    }
}

/// The result of an allocation, errno set and the error kept if there is none.
pub(crate) fn pointer(result: Result<*mut u8, Error>) -> *mut core::ffi::c_void {
    let error = match result {
        Ok(ptr) => return ptr.cast(),
        Err(error) => error,
    };
    let code = match keep(&error) {
        DCM_NO_MEMORY => libc::ENOMEM,
        _ => libc::EINVAL,
    };
    // SAFETY: this thread's errno.
    unsafe { *libc::__errno_location() = code };
    core::ptr::null_mut()
}

/// The text of an argument; `what` names it.
///
/// # Safety
/// `text` is null or a string that ends with a nul.
pub(crate) unsafe fn text<'a>(text: *const c_char, what: &'static str) -> Result<&'a str, Error> {
    if text.is_null() {
        return Err(Error::Null(what));
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str()
        .map_err(|_| Error::Invalid(format!("{what} is not UTF-8")))
}

/// What a status means, in a few words; a static string, never null.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_strerror(status: c_int) -> *const c_char {
    const TEXTS: [&CStr; 14] = [
        c"done",
        c"an argument can't be meant",
        c"no memory within the limits that hold",
        c"there is no such arena",
        c"not memory of an arena of this library",
        c"nothing has that name",
        c"can only be read",
        c"the value has another size",
        c"there are as many as there can be",
        c"no broker, or it refused",
        c"another copy of the library serves this process",
        c"the system refused a thread or addresses",
        c"there is no such pin",
        c"there is no such shared capacity",
    ];
    let text = usize::try_from(status)
        .ok()
        .and_then(|status| TEXTS.get(status));
    text.copied().unwrap_or(c"no status of dcmalloc").as_ptr()
}

/// What the calling thread's last call that failed refused, why, and what to
/// do; empty if none has. Valid until the thread's next call that fails.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_last_error() -> *const c_char {
    LAST.with(|last| last.0.get().cast_const().cast())
}
