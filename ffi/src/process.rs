//! The heap of this process, started from its environment.
//!
//! | variable | says |
//! |---|---|
//! | `DCMALLOC_CONF`, `DCMALLOC_CONF_FILE` | [`crate::settings`] |
//! | `DCM_SOCKET` | the broker's socket; default [`DEFAULT_SOCKET`] |
//! | `DCM_RUN` | the `dcm run` that the process belongs to (a UUID) |
//!
//! They are read with secure_getenv(3): a set-user-ID program ignores them.

use core::cell::UnsafeCell;
use core::ffi::CStr;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::OnceLock;

use dax_backend::broker::ConnectError;

use allocator::sync::Lock;
use allocator::{DcMalloc, ExtentSource, Heap, Placement};

use crate::broker_source::{BrokerSource, SourceError};
use crate::copies;
use crate::settings::{self, Line, environment, say};

/// Where a broker for the whole machine listens.
pub const DEFAULT_SOCKET: &CStr = c"/run/dcmalloc/broker.sock";

/// The heap.
pub static HEAP: Heap = Heap::new();
static BROKER: OnceLock<Address> = OnceLock::new();
static SOURCE: Source = Source::new();

/// Where this process and its children find the broker. A copy: a program may
/// write over its environment (setproctitle does).
struct Address {
    path: [u8; PATH],
    run: u128,
}

/// More than a unix socket's address holds.
const PATH: usize = 256;

impl Address {
    /// Of a socket, or of what the environment says. `None`: the path is too
    /// long for a socket.
    fn new(socket: Option<&CStr>) -> Option<Self> {
        let socket = socket.or_else(|| environment(c"DCM_SOCKET"));
        let text = socket.unwrap_or(DEFAULT_SOCKET).to_bytes_with_nul();
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

/// The places of the source that this process uses, and of its parent's: a
/// forked child that finds one of its own puts it where the grandparent's was,
/// because threads may be at work with the parent's.
struct Source {
    places: [UnsafeCell<MaybeUninit<BrokerSource>>; 2],
    next: AtomicUsize,
}

// SAFETY: written by `put` alone, whose callers have it for themselves.
unsafe impl Sync for Source {}

impl Source {
    const fn new() -> Self {
        Self {
            places: [const { UnsafeCell::new(MaybeUninit::uninit()) }; 2],
            next: AtomicUsize::new(0),
        }
    }

    /// # Safety
    /// Once in a process, by one thread: nobody uses what was put two times
    /// before, in its parent's parent.
    unsafe fn put(&'static self, source: BrokerSource) -> &'static BrokerSource {
        let place = &self.places[self.next.fetch_xor(1, Ordering::Relaxed)];
        // SAFETY: the caller's. What was there is not dropped: its mappings and
        // descriptors are an ancestor's.
        unsafe { (*place.get()).write(source) }
    }
}

/// Why the heap of the process can't be started, or can't be told something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// There is another heap of this kind in the process.
    #[error(
        "another copy of dcmalloc serves this process: link libdcmalloc.so everywhere, or the archive once"
    )]
    SecondCopy,
    /// It has started, with the settings that it has.
    #[error("the heap has started: say settings before any other call, or in DCMALLOC_CONF")]
    Started,
    /// It found no addresses.
    #[error("the heap has no addresses to use (RLIMIT_AS): allow the process more")]
    NoSpace,
}

/// Why the heap has no broker, or not that one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The heap itself can't be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// No connection.
    #[error(transparent)]
    Source(#[from] SourceError),
}

/// Leaves a block alone that is not of this process's heap, and counts it; with
/// `verbose` the first is named on stderr.
#[cold]
pub fn leave_foreign(addr: usize) {
    if HEAP.note_foreign() && HEAP.config().verbose {
        say(&format_args!(
            "{addr:#x} is no block of this heap and is left alone: another allocator's?"
        ));
    }
}

static STARTED: OnceLock<Result<(), StartError>> = OnceLock::new();

/// Starts the heap and connects it to the broker, once; allocates nothing of
/// its own. Without a broker the heap is in DRAM.
///
/// # Errors
/// See [`StartError`]; the engine then serves allocations from DRAM.
pub fn start() -> Result<(), StartError> {
    *STARTED.get_or_init(|| {
        start_alone()?;
        let config = HEAP.config();
        if config.placement != Placement::Dram
            && let Err(error) = connect(&HEAP, None)
            && config.verbose
        {
            say(&format_args!("no extents, the heap stays in DRAM: {error}"));
        }
        Ok(())
    })
}

fn start_alone() -> Result<(), StartError> {
    copies::claim()?;
    let (config, refused) = settings::read();
    HEAP.note_unknown_settings(refused);
    match HEAP.start(config) {
        true => Ok(()),
        false => Err(StartError::NoSpace),
    }
}

/// Settings over those of the environment; the text has been
/// [checked](crate::settings::check).
///
/// # Errors
/// The heap has started.
pub fn configure(text: &str) -> Result<(), StartError> {
    if STARTED.get().is_some() {
        return Err(StartError::Started);
    }
    settings::configure(text);
    Ok(())
}

/// Starts the heap and connects it to the broker at `socket`; at `None`, to
/// that of the environment or of the machine.
///
/// # Errors
/// See [`AttachError`].
pub fn attach_to(socket: Option<&CStr>) -> Result<(), AttachError> {
    (*STARTED.get_or_init(start_alone))?;
    let same = |found: &CStr| Address::new(socket).is_some_and(|address| address.path() == found);
    match broker().is_some_and(same) {
        true => Ok(()),
        false => Ok(connect(&HEAP, socket)?),
    }
}

/// Attaches a Rust program's global allocator to the broker that `DCM_SOCKET`
/// names, or to the machine's. Forked children then find it by themselves.
/// Until then, and without a broker, everything is in DRAM.
///
/// The program says its settings itself, `DcMalloc::with(Config { … })`: neither
/// variable nor file is read for them.
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
    connect(heap.heap(), None)
}

/// The socket of the broker that the heap is attached to.
pub fn broker() -> Option<&'static CStr> {
    BROKER.get().map(Address::path)
}

/// Says for the last time what the heap holds.
pub fn end() {
    static ENDED: AtomicBool = AtomicBool::new(false);
    if !HEAP.is_started() || ENDED.swap(true, Ordering::Relaxed) {
        return;
    }
    HEAP.publish();
    if HEAP.config().stats_print {
        let mut line = Line::<8192>::new();
        // It has room for every number; nothing is lost that could be.
        let _ = serde_json::to_writer(&mut line, &HEAP.stats());
        line.print();
    }
}

fn connect(heap: &'static Heap, socket: Option<&CStr>) -> Result<(), SourceError> {
    static CONNECTING: Lock<()> = Lock::new(());
    let _once = CONNECTING.lock();
    let address = Address::new(socket).ok_or(ConnectError::Path)?;
    if broker().is_some() {
        return Err(SourceError::Attached);
    }
    let source = BrokerSource::connect(address.path(), address.run)?;
    // SAFETY: nothing is there yet: there is one place, for one heap.
    let source = unsafe { SOURCE.put(source) };
    heap.set_reconnect(reconnect);
    heap.attach(source).map_err(SourceError::Window)?;
    let _ = BROKER.set(address);
    Ok(())
}

/// A forked child's own connection, made on its worker.
fn reconnect() -> Option<&'static dyn ExtentSource> {
    let address = BROKER.get()?;
    let source = BrokerSource::connect_apart(address.path(), address.run).ok()?;
    // SAFETY: a child has one worker, and it is the one that this runs on. Its
    // threads may still be at work with the parent's, and know no other.
    Some(unsafe { SOURCE.put(source) })
}

/// The 32 hexadecimal digits of a UUID.
fn run_id(text: &CStr) -> u128 {
    let digits = text
        .to_bytes()
        .iter()
        .filter_map(|byte| char::from(*byte).to_digit(16));
    digits.fold(0, |id, digit| id << 4 | u128::from(digit))
}
