//! A forked child that may have no DRAM in place of extents waits while its
//! source is looked for. Each policy is a process of its own.

mod common;

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use allocator::source::ExtentSource;
use allocator::space::Backing;
use allocator::{Config, Heap, OnExhausted, Placement};
use common::MemfdSource;

static HEAP: Heap = Heap::new();
const ROLE: &str = "DCM_TEST_ROLE";
const GRANULES: usize = 16;
const LARGE: usize = 8 << 20;
/// How long it takes to find a source, or that there is none.
const LONG: Duration = Duration::from_millis(50);
/// For `wait`, in milliseconds.
const WAIT: u32 = 4_000;
static FOUND: AtomicBool = AtomicBool::new(true);

fn reconnect() -> Option<&'static dyn ExtentSource> {
    std::thread::sleep(LONG);
    FOUND
        .load(Relaxed)
        .then(|| MemfdSource::leak(GRANULES) as &'static dyn ExtentSource)
}

fn child() {
    let begun = Instant::now();
    let block = HEAP.allocate(LARGE, 64, false);
    if FOUND.load(Relaxed) {
        assert!(!block.is_null(), "{:?}", HEAP.stats());
        let backing = HEAP.space().backing_of(block.addr());
        assert!(matches!(backing, Some(Backing::Extent(_))), "{backing:?}");
        assert!(begun.elapsed() < Duration::from_millis(WAIT.into()) / 2);
    } else {
        assert!(block.is_null(), "from nowhere");
    }
}

fn play(policy: OnExhausted) {
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: policy,
        ..Config::DEFAULT
    }));
    HEAP.set_reconnect(reconnect);
    HEAP.attach(MemfdSource::leak(GRANULES)).unwrap();
    for found in [true, false] {
        FOUND.store(found, Relaxed);
        // SAFETY: the child is this thread alone, and ends in what follows.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: a timer that ends this child if it hangs.
            unsafe { libc::alarm(60) };
            let done = std::panic::catch_unwind(child);
            // SAFETY: ends the child and runs nothing of the parent's.
            unsafe { libc::_exit(i32::from(done.is_err())) };
        }
        let mut status = 0;
        // SAFETY: a status of our own.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert_eq!(status, 0, "{policy:?}, found: {found}");
    }
}

#[test]
fn a_child_without_dram_waits_for_its_source() {
    if let Ok(role) = std::env::var(ROLE) {
        return play(match role.as_str() {
            "fail" => OnExhausted::Fail,
            _ => OnExhausted::Wait(WAIT),
        });
    }
    for role in ["fail", "wait"] {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .status()
            .unwrap();
        assert!(status.success(), "{role}");
    }
}
