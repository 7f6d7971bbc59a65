//! Arenas: granules of their own, limits, the end of one, callbacks under
//! pressure. One test, because a process has one heap.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use allocator::allocator_api2::{boxed::Box, vec::Vec as VecIn};
use allocator::source::Ranges;
use allocator::space::{Backing, GRANULE};
use allocator::{Arena, ArenaError, Config, Heap, OnExhausted, Placement};
use common::{MemfdSource, Random, moves, wait_for};
use hashbrown::{DefaultHashBuilder, HashMap};

static HEAP: Heap = Heap::new();
const GRANULES: usize = 64;
const MIB: u64 = 1 << 20;

type Map = HashMap<u64, VecIn<u8, Arena>, DefaultHashBuilder, Arena>;

fn bytes(arena: &Arena, len: usize, value: u8) -> VecIn<u8, Arena> {
    let mut bytes = VecIn::with_capacity_in(len, arena.clone());
    bytes.resize(len, value);
    bytes
}

fn granule_of<T: ?Sized>(value: &T) -> usize {
    (value as *const T).addr() / GRANULE
}

/// Maps, vectors and boxes of two arenas, on several threads.
fn containers() {
    let arenas: Vec<Arena> = ["left", "right"]
        .map(|name| HEAP.arena(name).build().unwrap())
        .into();
    let maps: Vec<Mutex<Map>> = arenas
        .iter()
        .map(|arena| Mutex::new(Map::new_in(arena.clone())))
        .collect();
    std::thread::scope(|scope| {
        for seed in 1..=4 {
            let (arenas, maps) = (&arenas, &maps);
            scope.spawn(move || {
                let mut random = Random(seed);
                for _ in 0..4_000 {
                    let (which, key) = (random.below(2), random.below(800) as u64);
                    let value = bytes(&arenas[which], 1 + random.below(3000), key as u8);
                    let old = maps[which].lock().unwrap().insert(key, value);
                    // Freed by another thread than made it, most of the time.
                    assert!(old.is_none_or(|old| old.iter().all(|byte| *byte == key as u8)));
                }
            });
        }
    });
    let granules = |map: &Map| -> std::collections::BTreeSet<usize> {
        let values = map.values().map(|value| granule_of(value.as_slice()));
        values.collect()
    };
    let maps: Vec<Map> = maps
        .into_iter()
        .map(|map| map.into_inner().unwrap())
        .collect();
    let (left, right) = (granules(&maps[0]), granules(&maps[1]));
    assert!(left.is_disjoint(&right), "arenas share a granule");
    let mut plain = Vec::new();
    for size in 1..600 {
        let block = HEAP.allocate(size * 50, 16, false);
        assert!(
            !left.contains(&(block.addr() / GRANULE)),
            "a granule is shared with the heap"
        );
        plain.push(block);
    }
    // SAFETY: live blocks, each freed once.
    plain
        .iter()
        .for_each(|block| unsafe { allocator::engine::free(*block) });
    let value = Box::new_in([7u64; 100], arenas[0].clone());
    assert_eq!(value.iter().sum::<u64>(), 700);
    for arena in &arenas {
        let stats = arena.stats();
        assert!(
            stats.pages >= stats.allocated && stats.allocated > 800_000,
            "{stats:?}"
        );
    }
}

/// A limit refuses, purges first, and has room again for what is freed.
fn limits() {
    let arena = HEAP.arena("limited").limit(8 * MIB).build().unwrap();
    let mut blocks = Vec::new();
    loop {
        let block = arena.allocate_bytes(100_000, 16, false);
        if block.is_null() {
            break;
        }
        blocks.push(block);
        assert!(arena.stats().pages <= 8 * MIB);
    }
    assert!(blocks.len() >= 70, "{}", blocks.len());
    assert!(arena.stats().over_limit > 0);
    for block in blocks.drain(..) {
        // SAFETY: live, of this size, freed once.
        unsafe { arena.free_bytes(block, 100_000, 16) };
    }
    // In another size: what was freed is purged, not wasted.
    let other = arena.allocate_bytes(7 << 20, 4096, true);
    assert!(!other.is_null());
    // SAFETY: as above; a new block reads as zeroes.
    unsafe {
        assert!((0..7 << 20).step_by(4096).all(|at| *other.add(at) == 0));
        arena.free_bytes(other, 7 << 20, 4096);
    }
    arena.purge();
    assert_eq!(arena.stats().pages, 0);
}

/// The memory of an arena goes with its last clone, and its place is used
/// again, as often as one likes.
fn ends() {
    let (arenas, live) = (HEAP.stats().arenas, HEAP.stats().usage.extent_live);
    for round in 0..600 {
        let arena = HEAP.arena("short").build().unwrap();
        let other = arena.clone();
        std::thread::spawn(move || {
            // Never freed one by one: they go with the arena.
            for _ in 0..50 {
                assert!(!other.allocate_bytes(5000, 16, false).is_null());
            }
        })
        .join()
        .unwrap();
        let kept = bytes(&arena, 3_000, round as u8);
        let id = arena.id();
        let arena = arena.try_end().unwrap_err();
        drop(arena);
        assert!(kept.iter().all(|byte| *byte == round as u8));
        assert!(Arena::with(id, |_| ()).is_some());
        drop(kept);
        assert!(
            Arena::with(id, |_| ()).is_none(),
            "an id that is used again"
        );
    }
    assert_eq!(HEAP.stats().arenas, arenas);
    wait_for(&HEAP, "pages of ended arenas", || {
        HEAP.stats().usage.extent_live <= live
    });
    let empty = HEAP.arena("empty").build().unwrap();
    drop(bytes(&empty, 3_000, 1));
    assert!(empty.try_end().is_ok(), "nothing is live");
}

/// A child has no use for what its parent's other threads cached, and could
/// not tell in what state they left it.
fn forks() {
    let arena = HEAP.arena("forks").build().unwrap();
    let cached = || {
        let blocks: Vec<_> = (0..20)
            .map(|_| arena.allocate_bytes(1000, 16, false))
            .collect();
        // SAFETY: live, of this size, freed once.
        let free = |block: &*mut u8| unsafe { arena.free_bytes(*block, 1000, 16) };
        blocks.iter().for_each(free);
        blocks.last().map(|block| block.addr())
    };
    let last = cached();
    let (done, end) = (Barrier::new(2), Barrier::new(2));
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            cached();
            done.wait();
            end.wait();
        });
        done.wait();
        let status = in_child(|| {
            // SAFETY: the child uses this copy only, and drops no other.
            let arena = unsafe { core::ptr::read(&raw const arena) };
            // Its own cache serves it.
            let block = arena.allocate_bytes(1000, 16, false);
            assert_eq!(Some(block.addr()), last);
            // SAFETY: live, of this size, freed once.
            unsafe { arena.free_bytes(block, 1000, 16) };
            let arena = arena.try_end().expect_err("another's cache was flushed");
            drop(arena);
            let new = HEAP.arena("child's").build().unwrap();
            drop(bytes(&new, 3_000, 1));
            assert!(new.try_end().is_ok());
        });
        end.wait();
        // To the end of its thread, which the scope does not wait for.
        other.join().unwrap();
        assert_eq!(status, 0, "the child");
    });
    assert!(arena.try_end().is_ok(), "the thread took its cache along");
}

/// Runs `child` in a child, to its end. 0: all is well.
fn in_child(child: impl FnOnce()) -> i32 {
    // SAFETY: the child is this thread alone, and ends in what follows.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        // SAFETY: a timer that ends this child if it hangs.
        unsafe { libc::alarm(20) };
        let done = catch_unwind(AssertUnwindSafe(child));
        // SAFETY: ends the child and runs nothing of the parent's.
        unsafe { libc::_exit(i32::from(done.is_err())) };
    }
    let mut status = 0;
    // SAFETY: a status of our own.
    assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
    status
}

fn refusals() {
    let long = "x".repeat(allocator::MAX_NAME + 1);
    let refused = |builder: allocator::ArenaBuilder| builder.build().unwrap_err();
    assert_eq!(refused(HEAP.arena(&long)), ArenaError::Name(33));
    let interleaved = HEAP.arena("").placement(Placement::Interleave(2));
    assert_eq!(refused(interleaved), ArenaError::Interleave);
    let all: Vec<Arena> = std::iter::from_fn(|| HEAP.arena("many").build().ok()).collect();
    assert_eq!(all.len(), allocator::MAX_ARENAS);
    assert_eq!(refused(HEAP.arena("one more")), ArenaError::TooMany);
    drop(all);
    let arena = HEAP.arena("sizes").build().unwrap();
    assert!(arena.allocate_bytes(usize::MAX, 1, false).is_null());
    assert!(
        arena
            .allocate_bytes(isize::MAX as usize, 4096, false)
            .is_null()
    );
    assert!(arena.allocate_bytes(1 << 40, 4096, false).is_null());
}

fn placements(source: &'static MemfdSource) {
    let on_extent = |block: *mut u8| {
        let backing = HEAP.space().backing_of(block.addr());
        matches!(backing, Some(Backing::Extent(_)))
    };
    let build = |placement| HEAP.arena("placed").placement(placement).build().unwrap();
    let dram = build(Placement::Dram);
    let dc = build(Placement::Dc);
    let size = build(Placement::Size(64 << 10));
    for len in [64, 4096, 200_000, 3 << 20] {
        assert!(!on_extent(dram.allocate_bytes(len, 16, false)), "{len}");
        assert!(on_extent(dc.allocate_bytes(len, 4096, false)), "{len}");
        let large = len > 64 << 10;
        assert_eq!(
            on_extent(size.allocate_bytes(len, 16, false)),
            large,
            "{len}"
        );
    }
    // None left: each does what it was told.
    source.close(true);
    let build = |policy| HEAP.arena("short of").on_exhausted(policy).build().unwrap();
    let (to_dram, fails) = (build(OnExhausted::Dram), build(OnExhausted::Fail));
    let waits = build(OnExhausted::Wait(20_000));
    let mut hog = Vec::new();
    while let block = fails.allocate_bytes(GRANULE, GRANULE, false)
        && !block.is_null()
    {
        assert!(on_extent(block));
        hog.push(block);
    }
    let block = to_dram.allocate_bytes(GRANULE, GRANULE, false);
    assert!(!block.is_null() && !on_extent(block));
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let block = waits.allocate_bytes(GRANULE, GRANULE, false);
            assert!(!block.is_null() && on_extent(block));
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished());
        source.close(false);
        drop(fails);
        source.restore();
    });
}

/// Callbacks run by priority, until enough is free; they may allocate, panic
/// and block, and what they did not drop is moved.
fn pressure(source: &'static MemfdSource) {
    static ORDER: Mutex<Vec<&str>> = Mutex::new(Vec::new());
    let keep = HEAP.arena("data").priority(9).on_pressure(|_| {
        ORDER.lock().unwrap().push("data");
    });
    let data = bytes(&keep.build().unwrap(), 8 * GRANULE, 5);
    let panics = HEAP.arena("panics").priority(-1).on_pressure(|_| {
        ORDER.lock().unwrap().push("panics");
        panic!("on purpose");
    });
    let panics = panics.build().unwrap();
    // Weak, since what is in the arena owns the arena.
    let cache: Arc<Mutex<Vec<VecIn<u8, Arena>>>> = Arc::default();
    let weak = Arc::downgrade(&cache);
    let asked = Arc::new(AtomicU64::new(0));
    let heard = Arc::clone(&asked);
    let drops = HEAP.arena("cache").on_pressure(move |pressure| {
        ORDER.lock().unwrap().push("cache");
        heard.store(pressure.bytes, Ordering::Relaxed);
        let _scratch: Vec<u64> = (0..100_000).collect();
        if let Some(cache) = weak.upgrade() {
            cache.lock().unwrap().clear();
        }
    });
    let drops = drops.build().unwrap();
    let fill = || {
        let mut cache = cache.lock().unwrap();
        cache.extend((0..2048).map(|i| bytes(&drops, 4000, i as u8)));
    };
    fill();
    let evacuated = || HEAP.stats().evacuated;
    let live = HEAP.stats().usage.extent_live;
    assert!(live > 24 * MIB, "{live}");
    HEAP.trim();
    let before = evacuated();

    // What the cache drops is enough.
    let want = HEAP.stats().usage.idle + 6 * MIB;
    let outcome = source.recall(1, want);
    assert_eq!(outcome.refused.bytes(), 0, "{outcome:?}");
    assert_eq!(*ORDER.lock().unwrap(), ["panics", "cache"]);
    assert!((1..=6 * MIB).contains(&asked.load(Ordering::Relaxed)));
    assert_eq!(evacuated(), before, "dropping was enough");
    assert_eq!(HEAP.stats().callback_panics, 1);

    // Of everything: the rest is asked, and then moved.
    ORDER.lock().unwrap().clear();
    let outcome = source.recall(2, (GRANULES * GRANULE) as u64);
    assert_eq!(outcome.refused.bytes(), 0, "{outcome:?}");
    assert_eq!(*ORDER.lock().unwrap(), ["panics", "cache", "data"]);
    assert!(evacuated() > before);
    assert!(data.iter().all(|byte| *byte == 5));
    drop((panics, drops));
    source.send(allocator::source::Event::CapacityAvailable);

    // One that blocks holds up nothing for longer than half of the time.
    let gate = Arc::new(AtomicUsize::new(0));
    let (held, entered) = (Arc::clone(&gate), Arc::clone(&gate));
    let blocks = HEAP.arena("blocks").on_pressure(move |_| {
        entered.store(1, Ordering::Release);
        while held.load(Ordering::Acquire) < 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let blocks = blocks.build().unwrap();
    let some = bytes(&blocks, 4 * GRANULE, 9);
    let start = Instant::now();
    let all = (GRANULES * GRANULE) as u64;
    let outcome = source.ask_back(3, all, Ranges::EMPTY, Duration::from_secs(2));
    assert_eq!(outcome.refused.bytes(), 0, "{outcome:?}");
    assert_eq!(
        gate.load(Ordering::Acquire),
        1,
        "called, and still in there"
    );
    assert!(
        start.elapsed() >= Duration::from_millis(900),
        "not waited for"
    );
    // While it blocks, another recall does without.
    source.recall(4, all);
    gate.store(2, Ordering::Release);
    assert!(some.iter().all(|byte| *byte == 9));
}

#[test]
fn life_of_arenas() {
    let source = MemfdSource::leak(GRANULES);
    assert!(HEAP.start(Config {
        placement: Placement::Dram,
        on_exhausted: OnExhausted::Dram,
        decay_ms: 20,
        return_after_ms: 600_000,
        ..Config::DEFAULT
    }));
    HEAP.attach(source).unwrap();
    containers();
    limits();
    ends();
    forks();
    refusals();
    placements(source);
    if moves(&HEAP) {
        pressure(source);
    }
}
