//! The heap of this process, started from its environment.
//!
//! | variable | says |
//! |---|---|
//! | `DCMALLOC_CONF` | settings, `key:value,…` (`allocator::config::KEYS`) |
//! | `DCM_SOCKET` | the broker's socket; default [`DEFAULT_SOCKET`] |
//! | `DCM_RUN` | the `dcm run` that the process belongs to (a UUID) |
//!
//! They are read with secure_getenv(3): a set-user-ID program ignores them.

use core::cell::UnsafeCell;
use core::ffi::{CStr, c_char};
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

use dax_backend::broker::ConnectError;

use allocator::{Config, DcMalloc, ExtentSource, Heap, Placement};

use crate::broker_source::{BrokerSource, SourceError};

/// Where a broker for the whole machine listens.
pub const DEFAULT_SOCKET: &CStr = c"/run/dcmalloc/broker.sock";

/// The heap.
pub static HEAP: Heap = Heap::new();
static BROKER: OnceLock<Address> = OnceLock::new();
static SOURCE: Source = Source(UnsafeCell::new(MaybeUninit::uninit()));

/// Where this process and its children find the broker. A copy: a program may
/// write over its environment (setproctitle does).
struct Address {
    path: [u8; PATH],
    run: u128,
}

/// More than a unix socket's address holds.
const PATH: usize = 256;

impl Address {
    /// `None`: the path is too long for a socket.
    fn from_environment() -> Option<Self> {
        let text = environment(c"DCM_SOCKET").unwrap_or(DEFAULT_SOCKET);
        let text = text.to_bytes_with_nul();
        let mut path = [0; PATH];
        path.get_mut(..text.len())?.copy_from_slice(text);
        Some(Self {
            path,
            run: environment(c"DCM_RUN").map_or(0, run_id),
        })
    }

    fn path(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.path).unwrap_or(DEFAULT_SOCKET)
    }
}

/// The place of the one source that this process uses: that of the process
/// itself, which a forked child finds there too and replaces by its own.
struct Source(UnsafeCell<MaybeUninit<BrokerSource>>);

// SAFETY: written by `put` alone, whose callers have it for themselves.
unsafe impl Sync for Source {}

impl Source {
    /// # Safety
    /// No thread of this process uses what is there.
    unsafe fn put(&'static self, source: BrokerSource) -> &'static BrokerSource {
        // SAFETY: the caller's. What was there is not dropped: its mappings and
        // descriptors are the parent's.
        unsafe { (*self.0.get()).write(source) }
    }
}

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
        && let Err(error) = connect(&HEAP)
        && config.verbose
    {
        complain(&error);
    }
}

/// Attaches a Rust program's global allocator to the broker that `DCM_SOCKET`
/// names, or to the machine's. Forked children then find it by themselves.
/// Until then, and without a broker, everything is in DRAM.
///
/// ```no_run
/// use dcmalloc::DcMalloc;
///
/// #[global_allocator]
/// static HEAP: DcMalloc = DcMalloc::new();
///
/// fn main() {
///     if let Err(error) = dcmalloc::attach(&HEAP) {
///         eprintln!("the heap stays in DRAM: {error}");
///     }
/// }
/// ```
///
/// # Errors
/// No broker, one that can't be trusted, or no memory for tables; it may be
/// tried again. [`SourceError::Attached`] when a heap of this process has one.
pub fn attach(heap: &'static DcMalloc) -> Result<(), SourceError> {
    connect(heap.heap())
}

fn connect(heap: &'static Heap) -> Result<(), SourceError> {
    // There is one place for the source.
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Err(SourceError::Attached);
    }
    connect_first(heap).inspect_err(|_| TAKEN.store(false, Ordering::Release))
}

fn connect_first(heap: &'static Heap) -> Result<(), SourceError> {
    let address = Address::from_environment().ok_or(ConnectError::Path)?;
    let address = BROKER.get_or_init(|| address);
    let source = BrokerSource::connect(address.path(), address.run)?;
    // SAFETY: one thread is here, and nobody uses what an earlier attempt left.
    let source = unsafe { SOURCE.put(source) };
    heap.set_reconnect(reconnect);
    heap.attach(source).map_err(SourceError::Window)
}

/// A forked child's own connection, made on its worker. What is there is of no
/// use to any thread: they were the parent's.
fn reconnect() -> Option<&'static dyn ExtentSource> {
    let address = BROKER.get()?;
    let source = BrokerSource::connect_apart(address.path(), address.run).ok()?;
    // SAFETY: a child has one worker, and it is the one that this runs on.
    Some(unsafe { SOURCE.put(source) })
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
