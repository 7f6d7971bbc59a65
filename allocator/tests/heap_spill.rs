//! Live data that can go nowhere else goes to a file and comes back: when it is
//! touched, by the program or the kernel for it, when there is capacity again,
//! and before a fork. One test, because a process has one heap.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use allocator::config::SpillDir;
use allocator::source::{Ranges, Refusal};
use allocator::space::{Backing, GRANULE};
use allocator::{Config, Heap, OnExhausted, Placement, SpillState};
use common::{MemfdSource, moves, wait_for};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 64;
/// Live granules, each one block.
const BLOCKS: usize = 32;
/// Of them, how many find room in the file.
const SPILLED: usize = 20;

const fn granules(count: usize) -> u64 {
    (count * GRANULE) as u64
}

fn fill(number: usize) -> *mut u8 {
    let block = HEAP.allocate(GRANULE, 16, false);
    assert!(!block.is_null());
    // SAFETY: a new block of this size.
    let words = unsafe { std::slice::from_raw_parts_mut(block.cast::<u64>(), GRANULE / 8) };
    for (i, word) in words.iter_mut().enumerate() {
        *word = (number * GRANULE + i) as u64;
    }
    block
}

fn check(number: usize, block: *mut u8) {
    // SAFETY: a live block of this size.
    let words = unsafe { std::slice::from_raw_parts(block.cast::<u64>(), GRANULE / 8) };
    let right = |(i, word): (usize, &u64)| *word == (number * GRANULE + i) as u64;
    assert!(words.iter().enumerate().all(right), "block {number}");
}

fn is_spilled(block: *mut u8) -> bool {
    HEAP.space().backing_of(block as usize) == Some(Backing::Spilled)
}

#[test]
fn what_is_spilled_comes_back() {
    let source = MemfdSource::leak(GRANULES);
    let dir = std::env::temp_dir();
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        dram_limit: 0,
        spill_dir: SpillDir::new(dir.to_str().unwrap()),
        spill_limit: granules(SPILLED),
        promote: 8 << 30,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    if HEAP.stats().spill != SpillState::Ring {
        println!("without io_uring: {:?}", HEAP.stats().spill);
    }
    let blocks: Vec<_> = (0..BLOCKS).map(fill).collect();
    let everywhere = |b: &[*mut u8]| b.iter().enumerate().for_each(|(i, b)| check(i, *b));
    let settled = |count| move || HEAP.stats().usage.extent_live >= granules(count);
    wait_for(&HEAP, "all on extents", settled(BLOCKS));

    // No DRAM and a file for some: the rest is refused, for that reason.
    source.close(true);
    let outcome = source.recall(1, granules(GRANULES));
    assert_eq!((outcome.to_dram, outcome.to_extents), (0, 0), "{outcome:?}");
    assert_eq!(outcome.spilled, granules(SPILLED), "{outcome:?}");
    assert_eq!(outcome.copied, granules(SPILLED), "{outcome:?}");
    let refused = outcome.refused.of(Refusal::SpillFull);
    assert_eq!(refused, granules(BLOCKS - SPILLED), "{outcome:?}");
    assert_eq!(outcome.refused.bytes(), refused);
    let usage = HEAP.stats().usage;
    assert_eq!(usage.spilled, granules(SPILLED), "{usage:?}");
    assert_eq!(usage.spilled_held, granules(SPILLED), "{usage:?}");
    let spilled: Vec<usize> = (0..BLOCKS).filter(|i| is_spilled(blocks[*i])).collect();
    assert_eq!(spilled.len(), SPILLED);

    // One that a thread touches, and one that the kernel reads for it.
    check(spilled[0], blocks[spilled[0]]);
    let (mut to, mut from) = UnixStream::pair().unwrap();
    // SAFETY: a live block.
    let bytes = unsafe { std::slice::from_raw_parts(blocks[spilled[1]], 4096) };
    to.write_all(bytes).unwrap();
    let mut got = [0; 4096];
    from.read_exact(&mut got).unwrap();
    assert_eq!(&got[..], bytes);
    // And one that it writes to, in the middle of the pages of two granules.
    let target = blocks[spilled[2]];
    // SAFETY: a live block, put right below.
    let part = unsafe { std::slice::from_raw_parts_mut(target.add(8192), 4096) };
    to.write_all(&[7; 4096]).unwrap();
    from.read_exact(part).unwrap();
    assert!(part.iter().all(|byte| *byte == 7));
    for (i, word) in part.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&((spilled[2] * GRANULE + 1024 + i) as u64).to_ne_bytes());
    }
    // Who waited is woken a moment before the books are written.
    wait_for(&HEAP, "three are back in DRAM", || {
        let in_dram =
            |i: &usize| HEAP.space().backing_of(blocks[*i] as usize) == Some(Backing::Dram);
        spilled[..3].iter().all(in_dram) && HEAP.stats().restored == 3
    });
    let stats = HEAP.stats();
    assert_eq!(stats.spill_lost, 0);
    assert_eq!(stats.usage.spilled_held, granules(SPILLED - 3));

    // What is freed there is forgotten, without being read.
    // SAFETY: a live block, not used again.
    unsafe { allocator::engine::free(blocks[spilled[3]]) };
    wait_for(&HEAP, "a freed granule is bare", || {
        HEAP.trim();
        HEAP.stats().usage.spilled_held == granules(SPILLED - 4)
    });
    let mut blocks = blocks;
    blocks[spilled[3]] = fill(spilled[3]);

    // A child has all of it.
    // SAFETY: the child only reads and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let all = std::panic::catch_unwind(|| everywhere(&blocks));
        // SAFETY: ends the child without running what the parent registered.
        unsafe { libc::_exit(i32::from(all.is_err())) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(status, 0, "the child");
    assert_eq!(HEAP.stats().usage.spilled_held, 0);

    // Capacity again: everything comes back, nobody touches it.
    source.close(false);
    source.restore();
    wait_for(&HEAP, "back on extents", settled(BLOCKS));
    source.close(true);
    let outcome = source.recall(2, granules(GRANULES));
    assert!(outcome.spilled > 0, "{outcome:?}");
    let before = HEAP.stats().restored;
    source.close(false);
    source.restore();
    wait_for(&HEAP, "back on extents", settled(BLOCKS));
    assert!(HEAP.stats().restored > before);
    assert_eq!(HEAP.stats().usage.spilled_held, 0);

    // Between storms of touching threads nothing is lost either.
    let blocks: Vec<usize> = blocks.iter().map(|block| *block as usize).collect();
    std::thread::scope(|scope| {
        let until = Instant::now() + Duration::from_secs(3);
        for first in 0..2 {
            let blocks = &blocks;
            scope.spawn(move || {
                let mut at = first;
                while Instant::now() < until {
                    at = (at + 2) % BLOCKS;
                    check(at, blocks[at] as *mut u8);
                }
            });
        }
        let mut id = 2;
        let mut spilled = 0;
        while Instant::now() < until {
            id += 1;
            source.close(true);
            let outcome = source.ask_back(
                id,
                granules(GRANULES),
                Ranges::EMPTY,
                Duration::from_secs(20),
            );
            spilled += outcome.spilled;
            source.close(false);
            source.restore();
            std::thread::sleep(Duration::from_millis(100));
        }
        println!("{} recalls, {} MiB spilled", id - 2, spilled >> 20);
        assert!(spilled > 0);
    });
    assert_eq!(HEAP.stats().spill_lost, 0);
    blocks
        .iter()
        .enumerate()
        .for_each(|(i, block)| check(i, *block as *mut u8));
}
