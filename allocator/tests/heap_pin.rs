//! Pins: what is pinned stays where it is whatever is recalled, spilled,
//! promoted or forked, and is named. One test, because a process has one heap.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use allocator::config::SpillDir;
use allocator::source::{Event, Ranges, Refusal, WindowRange};
use allocator::space::{Backing, GRANULE, MAX_PINS};
use allocator::{Config, Heap, OnExhausted, PinError, Placement, engine};
use common::{MemfdSource, moves, wait_for};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 48;
const BLOCKS: usize = 16;
/// DRAM takes so many granules, and the file the others.
const LIMIT: usize = 8;
/// What a child says that found all as it should be; one that panics says 0.
const FINE: i32 = 42;

const fn granules(count: usize) -> u64 {
    (count * GRANULE) as u64
}

fn block(value: u8) -> *mut u8 {
    let block = HEAP.allocate(GRANULE, 16, false);
    assert!(!block.is_null());
    // SAFETY: a new block of this size.
    unsafe { block.write_bytes(value, GRANULE) };
    block
}

fn holds(block: *mut u8, value: u8) -> bool {
    // SAFETY: a live block of this size, which nobody writes to now.
    let bytes = unsafe { std::slice::from_raw_parts(block, GRANULE) };
    bytes.iter().all(|byte| *byte == value)
}

fn backing(block: *mut u8) -> Backing {
    HEAP.space().backing_of(block.addr()).unwrap()
}

fn is_on_extent(block: *mut u8) -> bool {
    matches!(backing(block), Backing::Extent(_))
}

fn refuses_bad_input() {
    let refused = |ptr: *const u8, len| HEAP.pin(ptr, len).unwrap_err();
    let foreign = |ptr: *const u8, len| {
        let addr = ptr.addr();
        assert_eq!(refused(ptr, len), PinError::Foreign { addr, len });
    };
    let good = block(1);
    let local = [0u8; 64];
    foreign(std::ptr::null(), 1);
    foreign(local.as_ptr(), local.len());
    foreign(good, usize::MAX);
    // Beyond what was ever used.
    foreign(good, 64 << 30);
    assert_eq!(refused(good, 0), PinError::Empty);
    let freed = block(2);
    // SAFETY: live, freed once.
    unsafe { engine::free(freed) };
    HEAP.trim();
    foreign(freed, 1);
    let text = refused(freed, 1).to_string();
    assert!(text.contains("not all in use in this heap"), "{text}");

    let all: Vec<_> = (0..MAX_PINS).map(|_| HEAP.pin(good, 10).unwrap()).collect();
    assert_eq!(refused(good, 10), PinError::TooMany);
    assert_eq!(HEAP.stats().pinned, granules(1));
    drop(all);
    assert_eq!(HEAP.stats().pinned, 0);
    // SAFETY: live, freed once.
    unsafe { engine::free(good) };
}

/// The rest returns, and the receipt names the pins.
fn a_recall_goes_round_them(source: &MemfdSource) {
    let blocks: Vec<_> = (0..LIMIT).map(|i| block(i as u8)).collect();
    wait_for(&HEAP, "all on extents", || {
        blocks.iter().all(|b| is_on_extent(*b))
    });
    let mut ranges = Ranges::EMPTY;
    for block in &blocks {
        let Backing::Extent(offset) = backing(*block) else {
            unreachable!()
        };
        let len = GRANULE as u64;
        assert!(ranges.push(WindowRange { offset, len }));
    }
    let (two, part) = (HEAP.pin(blocks[2], GRANULE), HEAP.pin(blocks[5], 4096));
    let (two, part) = (two.unwrap(), part.unwrap());
    let again = HEAP.pin(blocks[2], 1).unwrap();
    let before = [2, 5].map(|i| backing(blocks[i]));

    let outcome = source.recall_ranges(1, &ranges);
    assert_eq!(
        outcome.returned(),
        ranges.bytes() - granules(2),
        "{outcome:?}"
    );
    let refused: Vec<_> = outcome.refused.iter().collect();
    assert_eq!(refused.len(), 1, "{outcome:?}");
    assert_eq!(
        (refused[0].reason, refused[0].bytes),
        (Refusal::Pinned, granules(2))
    );
    let named: Vec<Backing> = refused[0]
        .ranges
        .as_slice()
        .iter()
        .flat_map(|r| (r.offset..r.offset + r.len).step_by(GRANULE))
        .map(Backing::Extent)
        .collect();
    assert!(
        named.len() == 2 && before.iter().all(|b| named.contains(b)),
        "{named:?}"
    );
    assert_eq!([2, 5].map(|i| backing(blocks[i])), before);

    // One of two pins is enough.
    drop((part, two));
    let outcome = source.recall_ranges(2, &ranges);
    assert_eq!(outcome.returned(), granules(1), "{outcome:?}");
    assert_eq!(outcome.refused.of(Refusal::Pinned), granules(1));
    drop(again);
    let outcome = source.recall_ranges(3, &ranges);
    assert_eq!(
        (outcome.returned(), outcome.refused.bytes()),
        (granules(1), 0)
    );
    source.restore();
    for (i, block) in blocks.iter().enumerate() {
        assert!(holds(*block, i as u8));
        // SAFETY: live, freed once.
        unsafe { engine::free(*block) };
    }
}

/// What is freed under a pin goes when the pin does, and to nobody before.
fn freed_under_a_pin(source: &MemfdSource) {
    HEAP.trim();
    let one = block(1);
    wait_for(&HEAP, "on an extent", || is_on_extent(one));
    let pin = HEAP.pin(one, GRANULE).unwrap();
    // SAFETY: live, freed once.
    unsafe { engine::free(one) };
    let outcome = source.recall(4, granules(GRANULES));
    assert!(is_on_extent(one), "{outcome:?}");
    assert_eq!(
        outcome.refused.of(Refusal::Pinned),
        granules(1),
        "{outcome:?}"
    );
    drop(pin);
    let outcome = source.recall(5, granules(GRANULES));
    assert_eq!(outcome.refused.bytes(), 0, "{outcome:?}");
    assert_eq!(backing(one), Backing::None);
    assert_eq!(HEAP.stats().usage.extent_held, 0);
    source.send(Event::CapacityAvailable);
}

/// Neither spilled nor, in DRAM, brought back; what is in the file comes back
/// to be pinned.
fn spills_and_promotions(source: &MemfdSource) {
    HEAP.trim();
    let blocks: Vec<_> = (0..BLOCKS).map(|i| block(i as u8)).collect();
    wait_for(&HEAP, "all on extents", || {
        blocks.iter().all(|b| is_on_extent(*b))
    });
    let pin = HEAP.pin(blocks[3], 100).unwrap();
    let before = backing(blocks[3]);
    source.close(true);
    let outcome = source.recall(6, granules(GRANULES));
    assert_eq!(
        outcome.refused.of(Refusal::Pinned),
        granules(1),
        "{outcome:?}"
    );
    assert_eq!(outcome.refused.bytes(), granules(1), "{outcome:?}");
    assert!(outcome.spilled > 0 && outcome.to_dram > 0, "{outcome:?}");
    assert_eq!(backing(blocks[3]), before);
    drop(pin);

    let find = |wanted| {
        let it = blocks.iter().position(|b| backing(*b) == wanted);
        it.unwrap_or_else(|| panic!("no block is {wanted:?}"))
    };
    let (spilled, dram) = (find(Backing::Spilled), find(Backing::Dram));
    let in_dram = HEAP.pin(blocks[dram], GRANULE).unwrap();
    let back = HEAP.pin(blocks[spilled], GRANULE).unwrap();
    assert_eq!(backing(blocks[spilled]), Backing::Dram);
    source.close(false);
    source.restore();
    let stay = [spilled, dram].map(|i| blocks[i]);
    wait_for(&HEAP, "the others on extents", || {
        let others = blocks.iter().filter(|b| !stay.contains(b));
        others.into_iter().all(|b| is_on_extent(*b))
    });
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(stay.map(backing), [Backing::Dram; 2], "they were moved");
    drop((in_dram, back));
    wait_for(&HEAP, "these too", || stay.iter().all(|b| is_on_extent(*b)));
    for (i, block) in blocks.iter().enumerate() {
        assert!(holds(*block, i as u8), "{i}");
        // SAFETY: live, freed once.
        unsafe { engine::free(*block) };
    }
}

/// Pins and recalls race: what is pinned stays where it was when it became so.
fn pins_wait_for_moves(source: &MemfdSource) {
    let blocks: Vec<_> = (0..LIMIT).map(|i| block(i as u8).addr()).collect();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let pinning = |offset: usize| {
            let (done, blocks) = (&done, &blocks);
            move || {
                let mut pins = 0;
                while !done.load(Ordering::Relaxed) {
                    let at = (pins + offset) % blocks.len();
                    let block = std::ptr::with_exposed_provenance_mut::<u8>(blocks[at]);
                    let pin = HEAP.pin(block, GRANULE).unwrap();
                    let before = backing(block);
                    std::thread::sleep(Duration::from_micros(pins as u64 % 7 * 100));
                    assert_eq!(backing(block), before, "a pinned granule was moved");
                    assert!(holds(block, at as u8));
                    drop(pin);
                    pins += 1;
                }
                pins
            }
        };
        let pinners = [scope.spawn(pinning(0)), scope.spawn(pinning(3))];
        let end = Instant::now() + Duration::from_secs(2);
        let (mut id, mut moved) = (100, 0);
        while Instant::now() < end || moved < granules(20) {
            source.close(true);
            moved += source.recall(id, granules(GRANULES)).moved();
            source.close(false);
            source.send(Event::CapacityAvailable);
            id += 1;
            assert!(Instant::now() < end + Duration::from_secs(60), "{moved}");
        }
        done.store(true, Ordering::Relaxed);
        let pins: Vec<usize> = pinners.map(|p| p.join().unwrap()).into();
        println!("{} granules moved, {pins:?} pins", moved / granules(1));
        assert!(pins.iter().all(|pins| *pins > 0));
    });
    assert_eq!(HEAP.stats().pinned, 0);
    for block in blocks {
        // SAFETY: live, freed once.
        unsafe { engine::free(std::ptr::with_exposed_provenance_mut(block)) };
    }
}

/// What is pinned is not in the child, and is counted; the parent's pins are
/// not the child's.
fn forks() {
    HEAP.trim();
    let (stays, moves) = (block(7), block(8));
    wait_for(&HEAP, "on extents", || {
        is_on_extent(stays) && is_on_extent(moves)
    });
    let pin = HEAP.pin(stays, GRANULE).unwrap();
    let (before, unforked) = (backing(stays), HEAP.stats().unforked);
    // SAFETY: the child does what a child of a program with threads may, but
    // for malloc, which the heap's handlers allow.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let own = HEAP.pin(moves, GRANULE).unwrap();
        let pinned = || HEAP.stats().pinned == granules(1);
        let mut fine = pinned() && holds(moves, 8) && backing(stays) == Backing::Lost;
        drop(pin);
        fine &= pinned() && matches!(HEAP.pin(stays, 1), Err(PinError::Foreign { .. }));
        drop(own);
        fine &= HEAP.stats().pinned == 0;
        // SAFETY: ends the child without the test's own handlers.
        unsafe { libc::_exit(if fine { FINE } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: a child of this process.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, FINE << 8, "the child's pins, or its memory");
    assert_eq!(HEAP.stats().unforked, unforked + 1);
    assert_eq!(backing(stays), before);
    assert!(holds(stays, 7));
    drop(pin);
}

#[test]
fn what_is_pinned_stays() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        dram_limit: granules(LIMIT),
        spill_dir: SpillDir::new(std::env::temp_dir().to_str().unwrap()),
        promote: 8 << 30,
        return_after_ms: 600_000,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    refuses_bad_input();
    if !moves(&HEAP) {
        return;
    }
    a_recall_goes_round_them(source);
    freed_under_a_pin(source);
    spills_and_promotions(source);
    pins_wait_for_moves(source);
    forks();
}
