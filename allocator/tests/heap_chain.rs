//! The chain, whole and in its order, in one receipt: what is idle, what a
//! purge empties, what callbacks drop by priority, what moves to extents that
//! stay, to DRAM and to the file as far as each reaches, and by name and reason
//! what is left. One test, because a process has one heap.

mod common;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use allocator::allocator_api2::vec::Vec as VecIn;
use allocator::config::SpillDir;
use allocator::source::{ExtentSource, Ranges, Refusal, WindowRange};
use allocator::space::{Backing, GRANULE};
use allocator::{Arena, Config, Heap, OnExhausted, Placement};
use common::{MemfdSource, moves};
use rustix::mm::{MprotectFlags, mprotect};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 64;
/// What each step is to find, in granules; idle is what is kept ready.
const PURGED: usize = 4;
const DROPPED: usize = 2;
const TO_EXTENTS: usize = 5;
const TO_DRAM: usize = 6;
const SPILLED: usize = 7;
/// Blocks of a granule each.
const BLOCKS: usize = 28;
/// Longer than the test takes: nothing goes back but for the recall.
const NEVER_MS: u32 = 3_600_000;

const fn granules(count: usize) -> u64 {
    (count * GRANULE) as u64
}

fn fill(number: usize) -> *mut u8 {
    let block = HEAP.allocate(GRANULE, 16, false);
    assert!(!block.is_null());
    // SAFETY: a new block of this size.
    unsafe { block.write_bytes(number as u8, GRANULE) };
    block
}

fn free(block: *mut u8) {
    // SAFETY: a live block, not used again.
    unsafe { allocator::engine::free(block) };
}

/// The extent behind an address.
fn extent(at: usize) -> WindowRange {
    let Some(Backing::Extent(offset)) = HEAP.space().backing_of(at) else {
        panic!("{at:#x} is not on an extent");
    };
    let len = GRANULE as u64;
    WindowRange { offset, len }
}

fn ranges(mut extents: Vec<WindowRange>) -> Ranges {
    extents.sort_by_key(|range| range.offset);
    let mut ranges = Ranges::EMPTY;
    assert!(extents.into_iter().all(|range| ranges.push(range)));
    ranges
}

/// What callbacks were told, in their order: which, bytes, granules that had
/// moved by then.
type Calls = Arc<Mutex<Vec<(&'static str, u64, u64)>>>;
type Cache = Arc<Mutex<Option<VecIn<u8, Arena>>>>;

/// An arena with one granule that its callback drops.
fn cache(name: &'static str, priority: i32, calls: &Calls) -> Cache {
    let cache = Cache::default();
    let (drops, calls) = (Arc::clone(&cache), Arc::clone(calls));
    let arena = HEAP
        .arena(name)
        .priority(priority)
        .on_pressure(move |pressure| {
            let moved = HEAP.stats().evacuated;
            calls.lock().unwrap().push((name, pressure.bytes, moved));
            drop(drops.lock().unwrap().take());
        })
        .build()
        .unwrap();
    let mut bytes = VecIn::with_capacity_in(GRANULE, arena.clone());
    // It outlives what is in it, and its callback is asked again.
    std::mem::forget(arena);
    bytes.resize(GRANULE, 1);
    *cache.lock().unwrap() = Some(bytes);
    cache
}

/// Extents full of pages that were freed, and that the engine keeps; and an
/// extent that is in use still.
fn freed_and_kept() -> (Vec<WindowRange>, Vec<WindowRange>) {
    const PAGES: usize = GRANULE / 4096;
    let mut of = BTreeMap::<usize, Vec<usize>>::new();
    for _ in 0..(PURGED + 1) * PAGES {
        let page = HEAP.allocate(4096, 16, false).addr();
        of.entry(page / GRANULE).or_default().push(page);
    }
    let (mut kept, mut used): (Vec<_>, Vec<_>) =
        of.into_values().partition(|pages| pages.len() == PAGES);
    used.extend(kept.drain(PURGED..));
    assert_eq!(kept.len(), PURGED);
    let extents = |of: &[Vec<usize>]| of.iter().map(|pages| extent(pages[0])).collect();
    let result = (extents(&kept), extents(&used));
    // Those freed last stay in the thread's cache.
    let last = used.iter().flat_map(|pages| &pages[1..]);
    for page in kept.iter().flatten().chain(last) {
        free(*page as *mut u8);
    }
    result
}

#[test]
fn every_step_takes_what_it_can_and_the_next_one_the_rest() {
    let source = MemfdSource::leak(GRANULES);
    let dir = std::env::temp_dir();
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        on_exhausted: OnExhausted::Dram,
        dram_limit: granules(TO_DRAM),
        spill_dir: SpillDir::new(dir.to_str().unwrap()),
        spill_limit: granules(SPILLED),
        decay_ms: NEVER_MS,
        return_after_ms: NEVER_MS,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    if !moves(&HEAP) {
        return;
    }
    let calls = Calls::default();
    // The one made first is asked last.
    let caches = [cache("second", 2, &calls), cache("first", 1, &calls)];
    let blocks: Vec<*mut u8> = (0..BLOCKS).map(fill).collect();
    let mut wanted: Vec<WindowRange> = blocks.iter().map(|b| extent(b.addr())).collect();
    let (purged, used) = freed_and_kept();
    wanted.extend(purged);
    for cache in &caches {
        let cache = cache.lock().unwrap();
        wanted.push(extent(cache.as_ref().unwrap().as_ptr().addr()));
    }

    // More than anybody has asked for. Of what is leased and unused then, some
    // extents stay, and everything else is wanted.
    source.request(granules(TO_EXTENTS + 1), allocator::Tag::NONE);
    source.close(true);
    let all = (0..granules(GRANULES)).step_by(GRANULE);
    let lent = all.map(|offset| WindowRange {
        offset,
        len: granules(1),
    });
    let lent = lent.filter(|range| source.lent_of(&ranges(vec![*range])) == 1);
    let mut staying: Vec<WindowRange> = lent
        .filter(|range| !wanted.contains(range) && !used.contains(range))
        .collect();
    let end = Instant::now() + Duration::from_secs(20);
    while HEAP.stats().usage.idle < granules(staying.len()) {
        assert!(Instant::now() < end, "{:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
    let idle = staying.split_off(TO_EXTENTS);
    assert!(!idle.is_empty());
    wanted.extend(&idle);

    // One of those that DRAM is for: an extent that it were given would be lost
    // to the others.
    let locked = blocks[TO_EXTENTS + 2];
    // SAFETY: a page of a live block, made writable again below.
    let protect = |access| unsafe { mprotect(locked.add(8192).cast(), 4096, access).unwrap() };
    protect(MprotectFlags::READ);
    let changed = extent(locked.addr());
    let wanted = ranges(wanted);
    let asked = wanted.bytes();
    let outcome = source.recall_ranges(1, &wanted);
    protect(MprotectFlags::READ | MprotectFlags::WRITE);

    let steps = [
        outcome.idle,
        outcome.purged,
        outcome.dropped,
        outcome.to_extents,
        outcome.to_dram,
        outcome.spilled,
    ];
    let expected = [idle.len(), PURGED, DROPPED, TO_EXTENTS, TO_DRAM, SPILLED].map(granules);
    assert_eq!(steps, expected, "{outcome:?}");
    assert_eq!(outcome.copied, granules(TO_EXTENTS + TO_DRAM + SPILLED));
    // Callbacks come after the purge and before anything moves, by priority,
    // and hear how much is still missing.
    let missing = asked - granules(idle.len() + PURGED);
    assert_eq!(
        *calls.lock().unwrap(),
        [("first", missing, 0), ("second", missing - granules(1), 0)]
    );
    // Of extents that stay, all are taken before DRAM, and all of that before
    // the file.
    let taken = blocks.iter().map(|b| HEAP.space().backing_of(b.addr()));
    let taken: Vec<Backing> = taken.map(Option::unwrap).collect();
    let on = |range: &WindowRange| taken.contains(&Backing::Extent(range.offset));
    assert!(staying.iter().all(on), "{taken:?}");
    let count = |backing| taken.iter().filter(|b| **b == backing).count();
    assert_eq!(count(Backing::Dram), TO_DRAM);
    assert_eq!(count(Backing::Spilled), SPILLED);
    // And what is left is named.
    assert_eq!(outcome.returned() + outcome.refused.bytes(), asked);
    let refused: Vec<_> = outcome.refused.iter().collect();
    assert_eq!(refused.len(), 2, "{outcome:?}");
    assert_eq!(refused[0].reason, Refusal::MappingChanged);
    assert_eq!(refused[0].ranges.as_slice(), [changed]);
    assert_eq!(refused[1].reason, Refusal::SpillFull);
    let left = blocks.len() - TO_EXTENTS - TO_DRAM - SPILLED - 1;
    assert_eq!(refused[1].ranges.bytes(), granules(left));

    for (number, block) in blocks.iter().enumerate() {
        // SAFETY: a live block of this size.
        let bytes = unsafe { std::slice::from_raw_parts(*block, GRANULE) };
        assert!(bytes.iter().all(|byte| *byte == number as u8), "{number}");
    }
    assert!(caches.iter().all(|cache| cache.lock().unwrap().is_none()));

    // Whoever wants just what is unused gets nothing of what is live, and no
    // refusal for it.
    let moved = HEAP.stats().evacuated;
    let outcome = source.thin(2, granules(GRANULES));
    assert_eq!(calls.lock().unwrap().len(), 4, "callbacks are called again");
    assert_eq!(
        (outcome.moved(), outcome.refused.bytes()),
        (0, 0),
        "{outcome:?}"
    );
    assert_eq!(HEAP.stats().evacuated, moved);
}
