//! A program without the right to the kernel's faults, under `moves:user`: its
//! memory moves while threads use it, and heap statistics say at what price.
//! One test, because a process has one heap.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use allocator::space::{Backing, GRANULE};
use allocator::{Config, Heap, Placement};
use common::MemfdSource;

static HEAP: Heap = Heap::new();
const GRANULES: usize = 8;

#[test]
fn unprivileged_memory_moves_if_the_settings_want_it() {
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if !rustix::process::geteuid().is_root() || allowed.is_ok_and(|v| v.trim() == "1") {
        println!("SKIPPED: takes root, who becomes nobody, and vm.unprivileged_userfaultfd=0");
        return;
    }
    // SAFETY: changes the whole process, which is this test's own.
    unsafe {
        assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
        assert_eq!(libc::setgid(65534), 0);
        assert_eq!(libc::setuid(65534), 0);
        // As a program that never was root, it may look at itself.
        assert_eq!(libc::prctl(libc::PR_SET_DUMPABLE, 1), 0);
    }
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        user_moves: true,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    let stats = HEAP.stats();
    assert!(stats.moves_live && stats.user_moves, "{stats:?}");

    let block = HEAP.allocate(GRANULE, 16, true);
    assert!(!block.is_null());
    // SAFETY: a live block that only atomics access.
    let word = unsafe { AtomicU64::from_ptr(block.cast()) };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut done = 0;
            while !stop.load(Relaxed) {
                word.fetch_add(1, Relaxed);
                done += 1;
            }
            done
        });
        for id in 1..20 {
            source.recall(id, (GRANULES * GRANULE) as u64);
        }
        stop.store(true, Relaxed);
        assert_eq!(writer.join().unwrap(), word.load(Relaxed));
    });
    let backing = HEAP.space().backing_of(block.addr());
    assert!(backing.is_some_and(|b| !matches!(b, Backing::None)));
    assert!(HEAP.stats().evacuated > 0);
}
