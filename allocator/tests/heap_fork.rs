//! A heap that forks, and whose children fork, while threads allocate and its
//! extents are recalled: each child sees the heap as of its fork and can use
//! it, and the parent's stays as it is. One test, because a process has one
//! heap.
//!
//! `DCM_STORM_SECONDS` makes it longer than its 8 s.

mod common;

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use allocator::space::GRANULE;
use allocator::{Config, Heap, OnExhausted, Placement, engine};
use common::{MemfdSource, Random, moves};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 96;
const MIB: usize = 1 << 20;
const GENERATIONS: u32 = 2;
/// A process that takes longer hangs.
const PATIENCE_S: u32 = 100;

/// What a child has to say with its exit code.
const FINE: i32 = 0;
const DATA_CHANGED: i32 = 2;
const NO_MEMORY: i32 = 3;
const NOT_KEPT: i32 = 4;
const GRANDCHILD: i32 = 5;
const NO_FORK: i32 = 6;

/// 64 MiB of words that all say the same number.
struct Data {
    blocks: Vec<(*mut u64, usize)>,
}

// SAFETY: only the thread that forks uses it.
unsafe impl Send for Data {}

impl Data {
    fn new() -> Self {
        let sizes = [(16 << 10, 2048), (2 * MIB, 8), (4 * MIB, 4)];
        let each = sizes
            .iter()
            .flat_map(|&(size, count)| (0..count).map(move |_| size));
        let blocks = each.map(|size| {
            let block = HEAP.allocate(size, 64, false);
            assert!(!block.is_null());
            (block.cast::<u64>(), size / 8)
        });
        Self {
            blocks: blocks.collect(),
        }
    }

    fn write(&self, number: u64) {
        for &(block, words) in &self.blocks {
            // SAFETY: a live block of so many words that is this thread's.
            unsafe { std::slice::from_raw_parts_mut(block, words) }.fill(number);
        }
    }

    fn says(&self, number: u64) -> bool {
        self.blocks.iter().all(|&(block, words)| {
            // SAFETY: as in `write`.
            let words = unsafe { std::slice::from_raw_parts(block, words) };
            words.iter().all(|word| *word == number)
        })
    }
}

/// Allocates, fills, checks and frees blocks of 16 B to 256 KiB. `Err` with an
/// exit code: something is wrong.
fn use_heap(random: &mut Random, times: usize) -> Result<(), i32> {
    let mut blocks = [(std::ptr::null_mut::<u8>(), 0, 0u8); 16];
    for time in 0..times + blocks.len() {
        let slot = &mut blocks[time % 16];
        let (block, size, seed) = *slot;
        if !block.is_null() {
            // SAFETY: a live block of this size, not used again.
            unsafe {
                let bytes = std::slice::from_raw_parts(block, size);
                if bytes.iter().any(|byte| *byte != seed) {
                    return Err(NOT_KEPT);
                }
                engine::free(block);
            }
            slot.0 = std::ptr::null_mut();
        }
        if time < times {
            let most = 16 << random.below(15);
            let size = random.below(most) + 1;
            let block = HEAP.allocate(size, 16, false);
            if block.is_null() {
                return Err(NO_MEMORY);
            }
            let seed = random.below(256) as u8;
            // SAFETY: a new block of this size.
            unsafe { block.write_bytes(seed, size) };
            *slot = (block, size, seed);
        }
    }
    Ok(())
}

/// Forks; the child looks at the data, uses the heap and forks in turn.
/// Returns in the parent, with the child's id.
fn fork_child(data: &Data, number: u64, generation: u32) -> i32 {
    // SAFETY: the child calls nothing but this heap and async-signal-safe
    // functions.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        let code = child(data, number, generation);
        // SAFETY: ends the child and runs nothing of the parent's.
        unsafe { libc::_exit(code) };
    }
    pid
}

fn child(data: &Data, number: u64, generation: u32) -> i32 {
    // SAFETY: a timer that ends this child if it hangs.
    unsafe { libc::alarm(PATIENCE_S / 2) };
    if !data.says(number) {
        return DATA_CHANGED;
    }
    let mut random = Random(number + u64::from(generation));
    if let Err(code) = use_heap(&mut random, 300) {
        return code;
    }
    data.write(number + 1_000_000);
    if generation < GENERATIONS {
        let grandchild = fork_child(data, number + 1_000_000, generation + 1);
        // What it writes now is none of the grandchild's business.
        data.write(0);
        match wait(grandchild) {
            Some(FINE) => {}
            Some(code) => return GRANDCHILD + 10 * code,
            None => return NO_FORK,
        }
        return if data.says(0) { FINE } else { DATA_CHANGED };
    }
    if data.says(number + 1_000_000) {
        FINE
    } else {
        DATA_CHANGED
    }
}

/// The exit code of a child; a signal's number and 128.
fn wait(pid: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: a status of our own.
    let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
    (pid > 0 && waited == pid).then(|| match libc::WIFEXITED(status) {
        true => libc::WEXITSTATUS(status),
        false => 128 + libc::WTERMSIG(status),
    })
}

fn duration() -> Duration {
    let seconds = std::env::var("DCM_STORM_SECONDS").ok();
    Duration::from_secs(seconds.and_then(|s| s.parse().ok()).unwrap_or(8))
}

/// Recalls random halves of what is lent.
fn recall(source: &MemfdSource, stop: &AtomicBool) -> u64 {
    let mut random = Random(4711);
    let mut id = 0;
    while !stop.load(Relaxed) {
        id += 1;
        let lent = GRANULES - source.free_granules();
        let ranges = source.some_lent(lent / 2, &mut random);
        let outcome = source.recall_ranges(id, &ranges);
        assert_eq!(outcome.refused.bytes(), 0, "{outcome:?}");
        source.restore();
        std::thread::sleep(Duration::from_millis(30));
    }
    id
}

#[test]
fn children_see_the_heap_as_of_their_fork() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        promote: 8 << 30,
        decay_ms: 20,
        return_after_ms: 50,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let duration = duration();
    // SAFETY: a timer that ends this process if it hangs.
    unsafe { libc::alarm(duration.as_secs() as u32 + PATIENCE_S) };
    let data = Data::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stop = &stop;
        let users = [1, 2].map(|seed| {
            scope.spawn(move || {
                let mut random = Random(seed);
                while !stop.load(Relaxed) {
                    assert_eq!(use_heap(&mut random, 1000), Ok(()));
                }
            })
        });
        let recaller = scope.spawn(move || recall(source, stop));
        let forker = scope.spawn(move || {
            let end = Instant::now() + duration;
            let (mut number, mut slowest) = (0, Duration::ZERO);
            while Instant::now() < end {
                number += 1;
                data.write(number);
                let start = Instant::now();
                let pid = fork_child(&data, number, 1);
                slowest = slowest.max(start.elapsed());
                // The child must not see this, nor we what it writes.
                data.write(0);
                assert_eq!(wait(pid), Some(FINE), "child {number}");
                assert!(data.says(0));
            }
            (number, slowest, data)
        });
        let forks = forker.join();
        stop.store(true, Relaxed);
        users.into_iter().for_each(|user| user.join().unwrap());
        let recalls = recaller.join().unwrap();
        let (forks, slowest, data) = forks.unwrap();
        let stats = HEAP.stats();
        println!(
            "{forks} forks, the slowest {slowest:?}; {recalls} recalls, {} granules \
             evacuated, {} promoted",
            stats.evacuated, stats.promoted
        );
        assert!(forks > 1 && recalls > 1 && stats.evacuated > 0);
        // Nothing is the matter with the parent.
        data.write(7);
        comes_back();
        assert!(data.says(7));
    });
    assert!(source.free_granules() * GRANULE <= (GRANULES - 32) * GRANULE);
}

/// What forks moved to DRAM is on extents again.
fn comes_back() {
    let end = Instant::now() + Duration::from_secs(10);
    while HEAP.stats().usage.extent_live < 64 * MIB as u64 {
        assert!(Instant::now() < end, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(20));
    }
}
