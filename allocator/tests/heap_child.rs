//! A forked child is a client of its own: it connects when it first needs an
//! extent and not before, its granules move and come back when they are
//! recalled, and so it is in its own children. One test, because a process has
//! one heap.

mod common;

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use allocator::source::ExtentSource;
use allocator::space::{Backing, GRANULE};
use allocator::{Config, Heap, OnExhausted, Placement, engine};
use common::{MemfdSource, moves};

static HEAP: Heap = Heap::new();
/// Granules of each process's source.
const GRANULES: usize = 64;
const MIB: usize = 1 << 20;
const GENERATIONS: u32 = 2;
const PATIENCE: Duration = Duration::from_secs(30);

static SOURCE: AtomicPtr<MemfdSource> = AtomicPtr::new(std::ptr::null_mut());
static CONNECTIONS: AtomicU32 = AtomicU32::new(0);
/// A descriptor of the program's, and how often a callback has found it.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);
static FOUND: AtomicU32 = AtomicU32::new(0);

/// As a broker's source: with a descriptor table of its own.
fn reconnect() -> Option<&'static dyn ExtentSource> {
    CONNECTIONS.fetch_add(1, Relaxed);
    // SAFETY: this thread's own table from now on; nothing it has is in use.
    unsafe {
        assert_eq!(libc::unshare(libc::CLONE_FILES), 0);
        assert_eq!(libc::close(DESCRIPTOR.load(Relaxed)), 0);
    }
    let source = MemfdSource::leak(GRANULES);
    SOURCE.store(std::ptr::from_ref(source).cast_mut(), Relaxed);
    Some(source)
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Allocates a block of 1 MiB until one lies on an extent.
fn comes_to_lie_on_an_extent() -> *mut u64 {
    let end = Instant::now() + PATIENCE;
    loop {
        let block = HEAP.allocate(MIB, 64, false);
        assert!(!block.is_null());
        let backing = HEAP.space().backing_of(block as usize);
        if matches!(backing, Some(Backing::Extent(_))) {
            return block.cast();
        }
        assert!(Instant::now() < end, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn fill(block: *mut u64, number: u64) {
    // SAFETY: a live block of 1 MiB that is this thread's.
    unsafe { std::slice::from_raw_parts_mut(block, MIB / 8) }.fill(number);
}

fn says(block: *mut u64, number: u64) -> bool {
    // SAFETY: as above.
    let words = unsafe { std::slice::from_raw_parts(block, MIB / 8) };
    words.iter().all(|word| *word == number)
}

/// What a child of some generation does; `inherited` says `number` in it.
fn child(inherited: *mut u64, number: u64, generation: u32) {
    assert_eq!(CONNECTIONS.load(Relaxed), generation - 1);
    assert_eq!(threads(), 1, "a thread from inside fork");
    // What it inherited serves it for small things.
    for size in [1, 100, 1000] {
        // SAFETY: just allocated.
        unsafe { engine::free(HEAP.allocate(size, 16, false)) };
    }
    assert!(says(inherited, number));
    assert_eq!(CONNECTIONS.load(Relaxed), generation - 1, "for nothing");
    let stats = HEAP.stats();
    assert_eq!((stats.grants, stats.evacuated, stats.unforked), (0, 0, 0));
    assert_eq!(stats.usage.extent_held_peak, 0);

    let own = comes_to_lie_on_an_extent();
    assert_eq!(CONNECTIONS.load(Relaxed), generation);
    fill(own, number + 1);
    // SAFETY: stored by `reconnect`, and leaked.
    let source: &MemfdSource = unsafe { &*SOURCE.load(Relaxed) };
    let all = (GRANULES * GRANULE) as u64;
    let outcome = source.recall(u64::from(generation), all);
    assert_eq!(outcome.refused.bytes(), 0, "{outcome:?}");
    assert!(HEAP.stats().evacuated > 0);
    let found = FOUND.load(Relaxed);
    assert_eq!(
        found, generation,
        "a callback has not its program's descriptors"
    );
    assert!(says(own, number + 1) && says(inherited, number));
    fill(inherited, number + 2);
    if generation < GENERATIONS {
        let own = comes_to_lie_on_an_extent();
        fill(own, number + 3);
        fork_child(own, number + 3, generation + 1);
        assert!(says(own, number + 3));
        // SAFETY: live, and not used again.
        unsafe { engine::free(own.cast()) };
    }
    assert!(says(inherited, number + 2));
    HEAP.trim();
}

/// Runs [`child`] in a child, to its end.
fn fork_child(inherited: *mut u64, number: u64, generation: u32) {
    // SAFETY: the child is this thread alone, and ends in what follows.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: a timer that ends this child if it hangs.
        unsafe { libc::alarm(2 * PATIENCE.as_secs() as u32) };
        let done = std::panic::catch_unwind(|| child(inherited, number, generation));
        // SAFETY: ends the child and runs nothing of the parent's.
        unsafe { libc::_exit(i32::from(done.is_err())) };
    }
    let mut status = 0;
    // SAFETY: a status of our own.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    assert_eq!(status, 0, "child of generation {generation}");
}

#[test]
fn children_are_clients_of_their_own() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        ..Config::DEFAULT
    }));
    HEAP.set_reconnect(reconnect);
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    // A number that nothing else gets.
    let program = rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), 500).unwrap();
    DESCRIPTOR.store(program.as_raw_fd(), Relaxed);
    let asked = move |_: &_| {
        let open = rustix::io::fcntl_getfd(&program);
        FOUND.fetch_add(u32::from(open.is_ok()), Relaxed);
    };
    let _cache = HEAP.arena("cache").on_pressure(asked).build().unwrap();
    let block = comes_to_lie_on_an_extent();
    fill(block, 1);
    fork_child(block, 1, 1);
    assert!(says(block, 1));
    assert_eq!(CONNECTIONS.load(Relaxed), 0);
    assert_eq!(HEAP.stats().unforked, 0);
}
