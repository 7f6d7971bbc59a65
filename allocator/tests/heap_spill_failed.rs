//! A file system that is full: what it has taken of live data is spilled, the
//! rest stays where it is, for that reason, and nothing is lost. One test,
//! because a process has one heap.

mod common;

use std::ffi::CString;
use std::time::{Duration, Instant};

use allocator::config::SpillDir;
use allocator::source::Refusal;
use allocator::space::GRANULE;
use allocator::{Config, Heap, OnExhausted, Placement};
use common::{MemfdSource, moves};

static HEAP: Heap = Heap::new();
const BLOCKS: usize = 16;
/// What the file system has room for, in granules, tables not counted.
const ROOM: usize = 4;

/// A file system of its own, gone when the test ends however it does.
struct Tmpfs(CString);

impl Tmpfs {
    fn mount() -> Option<Self> {
        let dir = std::env::temp_dir().join(format!("dcm-full-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let path = CString::new(dir.to_str().unwrap()).unwrap();
        let size = CString::new(format!("size={}", ROOM * GRANULE)).unwrap();
        let (kind, flags) = (c"tmpfs".as_ptr(), libc::MS_NOSUID | libc::MS_NODEV);
        // SAFETY: strings that outlive the call.
        let code = unsafe { libc::mount(kind, path.as_ptr(), kind, flags, size.as_ptr().cast()) };
        let mounted = Self(path);
        (code == 0).then_some(mounted)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // The file is open still: the mount goes when its process does.
        // SAFETY: a string.
        unsafe { libc::umount2(self.0.as_ptr(), libc::MNT_DETACH) };
        let _ = std::fs::remove_dir(self.0.to_str().unwrap());
    }
}

#[test]
fn what_the_file_can_not_take_stays_and_is_named() {
    let Some(full) = Tmpfs::mount() else {
        println!("SKIPPED: mounting a small tmpfs takes root");
        return;
    };
    let source = MemfdSource::leak(64);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        dram_limit: 0,
        spill_dir: SpillDir::new(full.0.to_str().unwrap()),
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let fill = |number: usize| {
        let block = HEAP.allocate(GRANULE, 16, false);
        assert!(!block.is_null());
        // SAFETY: a new block of this size.
        unsafe { block.write_bytes(number as u8, GRANULE) };
        block
    };
    let blocks: Vec<*mut u8> = (0..BLOCKS).map(fill).collect();
    let all = (BLOCKS * GRANULE) as u64;
    let end = Instant::now() + Duration::from_secs(20);
    while HEAP.stats().usage.extent_live < all {
        assert!(Instant::now() < end, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    source.close(true);
    let outcome = source.recall(1, 64 * GRANULE as u64);
    assert!(outcome.spilled <= (ROOM * GRANULE) as u64, "{outcome:?}");
    let failed = outcome.refused.of(Refusal::SpillFailed);
    assert!(failed >= all - (ROOM * GRANULE) as u64, "{outcome:?}");
    assert_eq!(outcome.refused.bytes(), failed, "{outcome:?}");
    assert_eq!(outcome.spilled + failed, all, "{outcome:?}");
    for (number, block) in blocks.iter().enumerate() {
        // SAFETY: a live block of this size.
        let bytes = unsafe { std::slice::from_raw_parts(*block, GRANULE) };
        assert!(bytes.iter().all(|byte| *byte == number as u8), "{number}");
    }
    assert_eq!(HEAP.stats().spill_lost, 0);
}
