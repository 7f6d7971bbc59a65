//! Memory that a device takes by force: its owner is told within 100 ms and
//! finds zeroes, everybody else goes on; also while granules move, are spilled
//! and come back. One test, because a process has one heap.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use allocator::config::SpillDir;
use allocator::source::{Event, WindowRange};
use allocator::space::{Backing, GRANULE};
use allocator::{Arena, Config, Heap, OnExhausted, Placement};
use common::{MemfdSource, Random, moves, wait_for};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 64;
const BLOCKS: usize = 8;
/// What a program may expect.
const TOLD_WITHIN: Duration = Duration::from_millis(100);

const fn granules(count: usize) -> u64 {
    (count * GRANULE) as u64
}

fn block(arena: &Arena, value: u8) -> *mut u8 {
    let block = arena.allocate_bytes(GRANULE, GRANULE, false);
    assert!(!block.is_null());
    // SAFETY: a new block of this size.
    unsafe { block.write_bytes(value, GRANULE) };
    block
}

fn bytes<'a>(block: *mut u8) -> &'a [u8] {
    // SAFETY: a live block of this size, which nobody writes to now.
    unsafe { std::slice::from_raw_parts(block, GRANULE) }
}

fn holds(block: *mut u8, value: u8) -> bool {
    bytes(block).iter().all(|byte| *byte == value)
}

fn extent_of(block: *mut u8) -> Option<WindowRange> {
    match HEAP.space().backing_of(block.addr()).unwrap() {
        Backing::Extent(offset) => Some(WindowRange {
            offset,
            len: GRANULE as u64,
        }),
        _ => None,
    }
}

/// Scribbles on extents as whoever has them next would.
fn scribble(source: &MemfdSource, range: WindowRange) {
    let at = allocator::ExtentSource::window(source).0 + range.offset as usize;
    // SAFETY: a part of the window that nothing maps any more.
    unsafe { (at as *mut u8).write_bytes(0xAA, range.len as usize) };
}

/// Ends threads, also where a test fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One arena's extents go; it is told, another one and the heap go on.
fn the_owner_is_told(source: &MemfdSource) {
    let (say, told) = mpsc::channel();
    let blocked = HEAP.arena("blocked").on_pressure(|_| {
        std::thread::sleep(Duration::from_secs(4));
    });
    let blocked = blocked.build().unwrap();
    let other = HEAP.arena("other").on_lost(|_| panic!("not mine")).build();
    let other = other.unwrap();
    let kept: Vec<_> = (0..BLOCKS).map(|i| block(&other, i as u8)).collect();
    let counter = block(&other, 0).addr();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let done = Done(&done);
        let counting = scope.spawn(|| {
            let word = std::ptr::with_exposed_provenance::<AtomicU64>(counter);
            // SAFETY: a live block; only this thread uses it.
            let word = unsafe { &*word };
            let mut count = 0;
            while !done.0.load(Ordering::Relaxed) {
                assert_eq!(word.fetch_add(1, Ordering::Relaxed), count);
                count += 1;
            }
            count
        });
        // A callback that is busy with pressure holds up none of losses.
        let _busy = block(&blocked, 1);
        let pressed = scope.spawn(|| {
            let within = Duration::from_millis(200);
            source.ask_back(
                1,
                granules(GRANULES),
                allocator::source::Ranges::EMPTY,
                within,
            )
        });
        pressed.join().unwrap();
        source.send(Event::CapacityAvailable);

        let mut late = Vec::new();
        for round in 0..5u8 {
            let say = say.clone();
            let arena = HEAP.arena("mine").on_lost(move |lost| {
                say.send((Instant::now(), lost.bytes)).unwrap();
            });
            let arena = arena.build().unwrap();
            let mine: Vec<_> = (0..BLOCKS).map(|_| block(&arena, 9)).collect();
            wait_for(&HEAP, "all on extents", || {
                mine.iter().all(|b| extent_of(*b).is_some())
            });
            let (lose, keep) = mine.split_at(BLOCKS / 2);
            let extents: Vec<_> = lose.iter().map(|b| extent_of(*b).unwrap()).collect();
            let before = HEAP.stats().lost;
            // A pin holds nothing against a device.
            let pin = HEAP.pin(lose[2], GRANULE).unwrap();
            source.close(true);
            let start = Instant::now();
            let gone = source.take_by_force(&extents);
            assert_eq!(gone.bytes(), granules(lose.len()));
            let mut heard = 0;
            while heard < gone.bytes() {
                let (when, bytes) = told.recv_timeout(Duration::from_secs(20)).unwrap();
                heard += bytes;
                late.push(when - start);
            }
            assert_eq!(heard, gone.bytes());
            wait_for(&HEAP, "extents let go of", || source.gone_granules() == 0);
            extents.iter().for_each(|range| scribble(source, *range));
            assert!(lose.iter().all(|b| holds(*b, 0)), "not zeroes");
            assert!(keep.iter().all(|b| holds(*b, 9)));
            drop(pin);
            source.close(false);
            source.send(Event::CapacityAvailable);
            assert!(arena.is_lost() && !other.is_lost());
            assert_eq!(arena.stats().lost, gone.bytes());
            assert_eq!(HEAP.stats().lost - before, gone.bytes());
            // It is an arena as any other from now on.
            // SAFETY: live blocks of this arena.
            unsafe {
                lose[0].write_bytes(round, GRANULE);
                arena.free_bytes(lose[1], GRANULE, GRANULE);
            }
            assert!(holds(block(&arena, 3), 3) && holds(lose[0], round));
        }
        done.0.store(true, Ordering::Relaxed);
        assert!(counting.join().unwrap() > 0);
        late.sort();
        println!("told after {late:?}");
        assert!(late[late.len() / 2] < TOLD_WITHIN, "told after {late:?}");
    });
    for (i, block) in kept.iter().enumerate() {
        assert!(holds(*block, i as u8), "another arena's");
    }
    assert_eq!(HEAP.stats().callback_panics, 0);
}

/// Whether a granule faults: the kernel says so without a signal.
fn faults(block: *mut u8) -> bool {
    let (_from, to) = rustix::pipe::pipe().unwrap();
    let byte = &bytes(block)[..1];
    rustix::io::write(&to, byte) == Err(rustix::io::Errno::FAULT)
}

/// Forced releases hit granules while they move between extents, DRAM and the
/// file: each is whole or lost, as its arena's count says.
fn while_they_move(source: &MemfdSource) {
    let end = Instant::now() + Duration::from_secs(4);
    let mut random = Random(0x1057);
    let (mut rounds, mut zeroed, mut faulting) = (0u64, 0, 0);
    while Instant::now() < end || zeroed < 20 || faulting < 20 {
        let told = HEAP.arena("told").on_lost(|_| ()).build().unwrap();
        let untold = HEAP.arena("untold").build().unwrap();
        let blocks: Vec<_> = (0..2 * BLOCKS)
            .map(|i| block(if i % 2 == 0 { &told } else { &untold }, 1 + i as u8))
            .collect();
        std::thread::scope(|scope| {
            let ranges = source.some_lent(BLOCKS, &mut random);
            let recalling = scope.spawn(move || {
                if rounds % 2 == 0 {
                    source.close(true);
                    source.recall(100 + rounds, granules(GRANULES));
                    source.close(false);
                } else {
                    // To extents that are unused, as far as there are some.
                    source.recall_ranges(100 + rounds, &ranges);
                }
                source.restore();
            });
            while !recalling.is_finished() {
                let some = source.some_lent(2, &mut random);
                source.take_by_force(some.as_slice());
                std::thread::sleep(Duration::from_micros(random.below(3000) as u64));
            }
        });
        wait_for(&HEAP, "extents let go of", || source.gone_granules() == 0);
        let (mut zero, mut fault) = (0, 0);
        for (i, block) in blocks.iter().enumerate() {
            if i % 2 == 1 && faults(*block) {
                fault += 1;
            } else if i % 2 == 0 && holds(*block, 0) {
                zero += 1;
            } else {
                assert!(holds(*block, 1 + i as u8), "{i} is {:?}", bytes(*block)[0]);
            }
        }
        // Zeroes go to extents again, and may be lost there once more.
        let lost = told.stats().lost;
        assert!(
            lost >= granules(zero) && (lost > 0) == (zero > 0),
            "{lost} {zero}"
        );
        assert_eq!(untold.stats().lost, granules(fault), "faults");
        (zeroed, faulting, rounds) = (zeroed + zero, faulting + fault, rounds + 1);
        assert!(Instant::now() < end + Duration::from_secs(120), "{rounds}");
    }
    println!("{rounds} rounds, {zeroed} granules are zero, {faulting} fault");
}

#[test]
fn what_is_lost_is_said() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dram,
        on_exhausted: OnExhausted::Dram,
        dram_limit: granules(12),
        spill_dir: SpillDir::new(std::env::temp_dir().to_str().unwrap()),
        promote: 8 << 30,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    the_owner_is_told(source);
    if moves(&HEAP) {
        while_they_move(source);
    }
}
