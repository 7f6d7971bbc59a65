//! The heap of this process, started from its environment.
//!
//! | variable | says |
//! |---|---|
//! | `DCMALLOC_CONF` | settings, `key:value,…` (`allocator::config::KEYS`) |
//! | `DCM_SOCKET` | the broker's socket; default [`DEFAULT_SOCKET`] |
//! | `DCM_RUN` | the `dcm run` that the process belongs to (a UUID) |
//!
//! They are read with secure_getenv(3): a set-user-ID program ignores them.

use core::ffi::{CStr, c_char};
use std::sync::OnceLock;

use allocator::{Config, ExtentSource, Heap, Placement};

use crate::broker_source::{BrokerSource, SourceError};

/// Where a broker for the whole machine listens.
pub const DEFAULT_SOCKET: &CStr = c"/run/dcmalloc/broker.sock";

/// The heap.
pub static HEAP: Heap = Heap::new();
static SOURCE: OnceLock<BrokerSource> = OnceLock::new();

/// Starts the heap and connects it to the broker, once; allocates nothing of
/// its own. Without a broker the heap is in DRAM.
pub fn start() {
    let (config, refused) = environment(c"DCMALLOC_CONF").map_or((Config::DEFAULT, 0), |text| {
        text.to_str().map_or((Config::DEFAULT, 1), Config::read)
    });
    HEAP.note_unknown_settings(refused);
    if !HEAP.start(config) {
        return;
    }
    if config.placement != Placement::Dram
        && let Err(error) = attach()
        && config.verbose
    {
        complain(&error);
    }
}

fn attach() -> Result<(), SourceError> {
    let path = environment(c"DCM_SOCKET").unwrap_or(DEFAULT_SOCKET);
    let run = environment(c"DCM_RUN").map_or(0, run_id);
    let source = BrokerSource::connect(path, run)?;
    let source: &'static dyn ExtentSource = SOURCE.get_or_init(|| source);
    HEAP.attach(source).map_err(SourceError::Window)
}

/// What the environment says, if it may be trusted.
fn environment(name: &CStr) -> Option<&'static CStr> {
    unsafe extern "C" {
        fn secure_getenv(name: *const c_char) -> *const c_char;
    }
    // SAFETY: a nul-terminated name; libc returns null or a string that stays
    // for as long as the program leaves that variable alone, which it can't
    // have touched before its constructors have run.
    let value = unsafe { secure_getenv(name.as_ptr()) };
    // SAFETY: as above.
    (!value.is_null()).then(|| unsafe { CStr::from_ptr(value) })
}

/// The 32 hexadecimal digits of a UUID.
fn run_id(text: &CStr) -> u128 {
    let digits = text
        .to_bytes()
        .iter()
        .filter_map(|byte| char::from(*byte).to_digit(16));
    digits.fold(0, |id, digit| id << 4 | u128::from(digit))
}

/// One line on stderr, without the heap: the text goes into a fixed buffer.
fn complain(error: &SourceError) {
    use core::fmt::Write;
    struct Line {
        text: [u8; 256],
        len: usize,
    }
    impl Write for Line {
        fn write_str(&mut self, s: &str) -> core::fmt::Result {
            let room = &mut self.text[self.len..];
            let n = s.len().min(room.len());
            room[..n].copy_from_slice(&s.as_bytes()[..n]);
            self.len += n;
            Ok(())
        }
    }
    let mut line = Line {
        text: [0; 256],
        len: 0,
    };
    let _ = writeln!(
        line,
        "dcmalloc: no extents, the heap stays in DRAM: {error}"
    );
    let _ = rustix::io::write(rustix::stdio::stderr(), &line.text[..line.len]);
}
