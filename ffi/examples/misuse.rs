//! What the Rust face must refuse, or live with, and then lose nothing: settings too late, another global
//! allocator, another copy of the library. Prints a line for each check, and panics where one fails.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use allocator::{Arena, Heap};
use dcmalloc::allocator_api2::vec::Vec as VecIn;
use dcmalloc::process::{self, StartError};

/// The program's own allocator, which is not ours.
struct Other;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: what the system's does.
unsafe impl GlobalAlloc for Other {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Other = Other;

const LEN: usize = 1 << 20;
/// `DCM_SECOND_COPY` of `dcmalloc.h`.
const SECOND_COPY: c_int = 10;

fn heap() -> &'static Heap {
    process::start().expect("a heap");
    &process::HEAP
}

fn settings_too_late() {
    heap();
    assert_eq!(process::configure("decay:5"), Err(StartError::Started));
}

/// Each serves its own, and neither takes the other's for its own.
fn another_allocator() {
    let arena = heap().arena("ours").build().unwrap();
    let before = BYTES.load(Ordering::Relaxed);
    let mut ours = VecIn::with_capacity_in(LEN, arena.clone());
    ours.resize(LEN, 7u8);
    assert!(BYTES.load(Ordering::Relaxed) - before < LEN);
    let theirs = vec![8u8; LEN];
    assert!(BYTES.load(Ordering::Relaxed) - before >= LEN);
    let owner = |block: &[u8]| Arena::with_owner_of(heap(), block.as_ptr().addr(), Arena::id);
    assert_eq!((owner(&ours), owner(&theirs)), (Some(arena.id()), None));
    assert!(ours.iter().all(|byte| *byte == 7) && theirs.iter().all(|byte| *byte == 8));
}

/// The one that is loaded later starts no heap and says so; ours goes on.
fn another_copy() {
    let arena = heap().arena("before").build().unwrap();
    let mut kept = VecIn::with_capacity_in(LEN, arena);
    kept.resize(LEN, 9u8);
    let path = std::env::var("SECOND_COPY").expect("the path of another copy");
    let path = CString::new(path).unwrap();
    // SAFETY: a library that may be loaded into any process; its functions are those of `dcmalloc.h`.
    unsafe {
        let library = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!library.is_null(), "{:?}", CStr::from_ptr(libc::dlerror()));
        let create = libc::dlsym(library, c"dcm_arena_create".as_ptr());
        let last_error = libc::dlsym(library, c"dcm_last_error".as_ptr());
        assert!(!create.is_null() && !last_error.is_null());
        type Create = unsafe extern "C" fn(*const c_void, *mut u64) -> c_int;
        type LastError = unsafe extern "C" fn() -> *const c_char;
        let create = std::mem::transmute::<*mut c_void, Create>(create);
        let last_error = std::mem::transmute::<*mut c_void, LastError>(last_error);
        let mut arena = 0;
        assert_eq!(create(std::ptr::null(), &mut arena), SECOND_COPY);
        let said = CStr::from_ptr(last_error()).to_string_lossy();
        assert!(said.contains("another copy"), "{said}");
    }
    assert!(kept.iter().all(|byte| *byte == 9));
    heap().arena("after").build().unwrap();
}

fn main() {
    settings_too_late();
    println!("ok settings_too_late");
    another_allocator();
    println!("ok another_allocator");
    another_copy();
    println!("ok another_copy");
}
