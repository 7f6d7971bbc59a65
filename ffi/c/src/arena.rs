//! Making and ending arenas.

use core::ffi::{c_char, c_int, c_void};
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use allocator::{Arena, ArenaBuilder, Heap, Lost, MAX_ARENAS, Pressure};
use dcmalloc::process::HEAP;

use crate::error::{Error, dcm_status, status, text};
use crate::heap;

/// An arena: a number that no other arena of the process has or will have.
pub type dcm_arena = u64;

/// No arena.
pub const DCM_NO_ARENA_ID: dcm_arena = 0;

/// Extents are recalled, and what is unused is not enough.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dcm_pressure {
    /// Bytes that are still missing.
    pub bytes: u64,
    /// For how many milliseconds dropping is of use; what is live then is moved.
    pub within_ms: u64,
}

/// Called under pressure, on a thread of the library's, one callback at a time:
/// time to free what can be made again. It may allocate, free and block; no
/// exception may leave it. Anything but 0 says that it failed, and is counted
/// (`stats.callback_panics`).
pub type dcm_pressure_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, pressure: *const dcm_pressure) -> c_int>;

/// Content of an arena was lost: a device took its memory by force, or found
/// it broken.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct dcm_lost {
    /// Bytes that read as zeroes now, since the last call.
    pub bytes: u64,
}

/// Called when content was lost; as `dcm_pressure_fn`. With this, what is lost
/// reads as zeroes; without it, touching it raises SIGBUS, unless the setting
/// `on_lost` says otherwise.
pub type dcm_lost_fn =
    Option<unsafe extern "C" fn(context: *mut c_void, lost: *const dcm_lost) -> c_int>;

/// What an arena is to be. All zero but `struct_size` is an arena with
/// everything on extents and no limit.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dcm_arena_params {
    /// `sizeof(struct dcm_arena_params)`.
    pub struct_size: usize,
    /// For people, at most 32 bytes; null: none.
    pub name: *const c_char,
    /// Where allocations go, as the setting `placement` has it: `dc`, `dram`,
    /// `size=64K`; null: `dc`.
    pub placement: *const c_char,
    /// What happens when no extent is left, as the setting `on_exhausted` has
    /// it: `dram`, `fail`, `wait=MS`; null: what the heap does.
    pub on_exhausted: *const c_char,
    /// Bytes of pages that it may have; 0: any.
    pub limit: u64,
    /// When extents are recalled, callbacks of low priority are called first.
    pub priority: i32,
    /// Called under pressure; null: not at all.
    pub on_pressure: dcm_pressure_fn,
    /// Called when content was lost; null: not at all.
    pub on_lost: dcm_lost_fn,
    /// Passed to the callbacks.
    pub context: *mut c_void,
    /// Its extents are those with this tag, a UUID, and no others; null: those
    /// without a tag.
    pub tag: *const c_char,
}

/// An arena's callbacks, which may be running while it is ended.
struct Callbacks {
    on_pressure: dcm_pressure_fn,
    on_lost: dcm_lost_fn,
    context: *mut c_void,
    /// The process that the arena was made in.
    process: u32,
    ended: AtomicBool,
    /// Held while one runs.
    running: Mutex<()>,
    /// The thread that is in one; 0: none.
    inside: AtomicUsize,
}

// SAFETY: the context is the program's, which was told that callbacks run on
// another thread.
unsafe impl Send for Callbacks {}
// SAFETY: as above.
unsafe impl Sync for Callbacks {}

/// An arena that was made here.
struct Made {
    id: dcm_arena,
    callbacks: Arc<Callbacks>,
}

/// Those that have not ended, by the slot that is the low half of an id.
static MADE: [Mutex<Option<Made>>; MAX_ARENAS] = [const { Mutex::new(None) }; MAX_ARENAS];

fn made(id: dcm_arena) -> Option<MutexGuard<'static, Option<Made>>> {
    MADE.get((id & 0xffff) as usize).map(lock)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number of the calling thread's own.
fn this_thread() -> usize {
    thread_local! {
        static HERE: u8 = const { 0 };
    }
    HERE.with(|here| core::ptr::from_ref(here).addr())
}

impl Callbacks {
    fn new(params: &dcm_arena_params) -> Self {
        Self {
            on_pressure: params.on_pressure,
            on_lost: params.on_lost,
            context: params.context,
            process: std::process::id(),
            ended: AtomicBool::new(false),
            running: Mutex::new(()),
            inside: AtomicUsize::new(0),
        }
    }

    /// Runs one. That it failed is counted as that of a Rust program that panics.
    fn run(&self, call: impl FnOnce(*mut c_void) -> c_int) {
        let running = lock(&self.running);
        if self.ended.load(Ordering::Acquire) {
            return;
        }
        self.inside.store(this_thread(), Ordering::Release);
        let code = call(self.context);
        self.inside.store(0, Ordering::Release);
        drop(running);
        if code != 0 {
            resume_unwind(Box::new(code));
        }
    }

    /// From the return on none runs, unless this is called by one.
    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        let inside = self.inside.load(Ordering::Acquire) == this_thread();
        // In a forked child the thread that was in one is gone.
        if !inside && self.process == std::process::id() {
            drop(lock(&self.running));
        }
    }

    fn under_pressure(&self, pressure: &Pressure) {
        let Some(call) = self.on_pressure else {
            return;
        };
        let pressure = dcm_pressure {
            bytes: pressure.bytes,
            within_ms: pressure.within.as_millis() as u64,
        };
        // SAFETY: the program's function, with what it was promised.
        self.run(|context| unsafe { call(context, &pressure) });
    }

    fn of_loss(&self, lost: &Lost) {
        let Some(call) = self.on_lost else {
            return;
        };
        let lost = dcm_lost { bytes: lost.bytes };
        // SAFETY: the program's function, with what it was promised.
        self.run(|context| unsafe { call(context, &lost) });
    }
}

/// Reads `params` as a program of any version wrote it: what it does not have
/// is zero, and what this version does not know must be.
unsafe fn read(params: *const dcm_arena_params) -> Result<dcm_arena_params, Error> {
    // SAFETY: integers and pointers, all of which may be zero.
    let mut read: dcm_arena_params = unsafe { core::mem::zeroed() };
    if params.is_null() {
        return Ok(read);
    }
    // SAFETY: the caller's promise: at least its size is there.
    let size = unsafe { (*params).struct_size };
    let known = size_of::<dcm_arena_params>();
    if !(FIRST_SIZE..=MAX_SIZE).contains(&size) {
        return Err(Error::Invalid(format!(
            "struct_size is {size}: set it to sizeof(struct dcm_arena_params), which is {known}"
        )));
    }
    let bytes = params.cast::<u8>();
    // SAFETY: the caller's promise: `size` bytes are there.
    let unknown = (known..size).any(|at| unsafe { *bytes.add(at) } != 0);
    if unknown {
        return Err(Error::Invalid(
            "the parameters say more than this version of the library knows".into(),
        ));
    }
    let place = (&raw mut read).cast::<u8>();
    // SAFETY: both have so many bytes, and any bytes are a value.
    unsafe { bytes.copy_to_nonoverlapping(place, size.min(known)) };
    Ok(read)
}

/// What the structure had in version 0.1.
const FIRST_SIZE: usize = 72;
const MAX_SIZE: usize = 4096;

unsafe fn builder(heap: &'static Heap, params: &dcm_arena_params) -> Result<ArenaBuilder, Error> {
    let optional = |ptr: *const c_char, what| match ptr.is_null() {
        true => Ok(None),
        // SAFETY: the caller's promise.
        false => unsafe { text(ptr, what) }.map(Some),
    };
    let name = optional(params.name, "the name")?.unwrap_or_default();
    let mut builder = heap.arena(name).priority(params.priority);
    let mut config = *heap.config();
    let mut set = |key, value: &str| {
        let item = format!("{key}:{value}");
        config
            .set(&item)
            .map(|()| config)
            .map_err(|error| Error::Invalid(error.to_string()))
    };
    if let Some(value) = optional(params.placement, "the placement")? {
        builder = builder.placement(set("placement", value)?.placement);
    }
    if let Some(value) = optional(params.on_exhausted, "on_exhausted")? {
        builder = builder.on_exhausted(set("on_exhausted", value)?.on_exhausted);
    }
    if let Some(text) = optional(params.tag, "the tag")? {
        builder = builder.tag(text.parse()?);
    }
    if params.limit > 0 {
        builder = builder.limit(params.limit);
    }
    Ok(builder)
}

unsafe fn create(params: *const dcm_arena_params) -> Result<dcm_arena, Error> {
    // SAFETY: the caller's promise.
    let params = unsafe { read(params) }?;
    let heap = heap()?;
    // SAFETY: the caller's promise.
    let mut builder = unsafe { builder(heap, &params) }?;
    let callbacks = Arc::new(Callbacks::new(&params));
    if params.on_pressure.is_some() {
        let called = Arc::clone(&callbacks);
        builder = builder.on_pressure(move |pressure| called.under_pressure(pressure));
    }
    if params.on_lost.is_some() {
        let called = Arc::clone(&callbacks);
        builder = builder.on_lost(move |lost| called.of_loss(lost));
    }
    let id = builder.build()?.into_id();
    let _guard = heap.no_fork();
    if let Some(mut made) = made(id) {
        *made = Some(Made { id, callbacks });
    }
    Ok(id)
}

/// # Safety
/// As `dcm_arena_destroy`.
unsafe fn destroy(id: dcm_arena) -> Result<(), Error> {
    let taken = {
        let _guard = HEAP.no_fork();
        made(id).and_then(|mut made| made.take_if(|made| made.id == id))
    };
    let made = taken.ok_or(Error::NoArena(id))?;
    made.callbacks.end();
    // SAFETY: the one handle that `create` left behind this number, which
    // nobody else has taken.
    drop(unsafe { Arena::from_id(id) });
    Ok(())
}

/// Makes an arena and writes its number to `arena`. `params` may be null.
///
/// The heap has started then, from its settings; see `dcm_configure`.
///
/// # Safety
/// `params` is null or has as many bytes as its `struct_size` says, its texts
/// end with a nul, and its callbacks stay until `dcm_arena_destroy` has returned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_arena_create(
    params: *const dcm_arena_params,
    arena: *mut dcm_arena,
) -> dcm_status {
    if arena.is_null() {
        return status(Err(Error::Null("the place for the arena")));
    }
    // SAFETY: the caller's promise.
    let made = unsafe { create(params) };
    // SAFETY: not null, and the caller's.
    status(made.map(|id| unsafe { *arena = id }))
}

/// Ends an arena and frees all that was allocated from it, at once. A callback
/// of it that runs is waited for, unless it is the caller.
///
/// `DCM_NO_ARENA`: it has been ended before, and nothing was done.
///
/// # Safety
/// No other thread uses the arena or memory of it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_arena_destroy(arena: dcm_arena) -> dcm_status {
    // SAFETY: the caller's promise.
    status(unsafe { destroy(arena) })
}
