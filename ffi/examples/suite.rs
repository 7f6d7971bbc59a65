//! The Rust face: see `ffi/c/tests/behaviours.txt`. Prints a line for each check.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use allocator::{
    Arena, ArenaError, Heap, MAX_ARENAS, OnExhausted, PinError, Placement, SharedError, Tag,
};
use dax_backend::broker::admin::{AdminClient, AdminReply, AdminRequest, ReleaseTarget};
use dax_backend::broker::receipt::Receipt;
use dcmalloc::allocator_api2::alloc::{Allocator, Layout};
use dcmalloc::allocator_api2::{boxed::Box as BoxIn, vec::Vec as VecIn};
use dcmalloc::{process, settings};

const MIB: usize = 1 << 20;
/// What a check returns that can't be judged here.
type Verdict = Result<(), &'static str>;

fn heap() -> &'static Heap {
    process::start().expect("a heap");
    &process::HEAP
}

fn plain() -> Arena {
    heap().arena("").build().expect("an arena")
}

fn bytes(arena: &Arena, len: usize, value: u8) -> VecIn<u8, Arena> {
    let mut bytes = VecIn::with_capacity_in(len, arena.clone());
    bytes.resize(len, value);
    bytes
}

fn release(bytes: usize) -> Result<Receipt, &'static str> {
    let socket = process::broker().ok_or("no broker")?;
    let path = Path::new(OsStr::from_bytes(socket.to_bytes()));
    let broker = AdminClient::connect(path).expect("a connection");
    let request = AdminRequest::Release {
        target: ReleaseTarget::Bytes(bytes as u64),
        deadline_ms: 20_000,
        force: false,
        past_deadline: false,
        progress: false,
    };
    match broker.ask(&request, Duration::from_secs(40)) {
        Ok(AdminReply::Receipt(receipt)) => Ok(receipt),
        other => panic!("{other:?}"),
    }
}

fn arena_is_made_and_ended() -> Verdict {
    let before = Arena::count();
    let arena = heap().arena("index").build().unwrap();
    assert_eq!(Arena::count(), before + 1);
    assert_eq!(arena.name(), "index");
    let block = bytes(&arena, 100_000, 1);
    drop((arena, block));
    assert_eq!(Arena::count(), before);
    Ok(())
}

fn blocks_hold_what_is_written() -> Verdict {
    let arena = plain();
    let blocks: Vec<_> = (0..200)
        .map(|i| bytes(&arena, i * i + 1, i as u8))
        .collect();
    for (i, block) in blocks.iter().enumerate() {
        assert_eq!(block.len(), i * i + 1);
        assert!(block.iter().all(|byte| *byte == i as u8));
    }
    Ok(())
}

fn blocks_are_aligned_and_zeroed() -> Verdict {
    let arena = plain();
    let mut align = 1;
    while align <= 4 * MIB {
        let layout = Layout::from_size_align(100, align).unwrap();
        let block = arena.allocate(layout).unwrap().cast::<u8>();
        assert_eq!(block.addr().get() % align, 0);
        // SAFETY: just allocated with this layout.
        unsafe { arena.deallocate(block, layout) };
        align *= 4;
    }
    drop(bytes(&arena, 4 * MIB, 7));
    let layout = Layout::array::<u8>(4 * MIB).unwrap();
    let block = arena.allocate_zeroed(layout).unwrap();
    // SAFETY: as long as it says, zeroed, and nobody else's.
    assert!(unsafe { block.as_ref() }.iter().all(|byte| *byte == 0));
    // SAFETY: just allocated with this layout.
    unsafe { arena.deallocate(block.cast(), layout) };
    Ok(())
}

fn resizing_keeps_content() -> Verdict {
    let arena = plain();
    let mut block = bytes(&arena, 10, 3);
    let mut size = 100;
    while size < 8 * MIB {
        block.resize(size, 3);
        size *= 9;
    }
    assert!(block.iter().all(|byte| *byte == 3));
    block.truncate(50);
    block.shrink_to_fit();
    assert_eq!(block.as_slice(), [3; 50]);
    Ok(())
}

fn other_threads_free() -> Verdict {
    let arena = plain();
    let blocks: Vec<_> = (1..2000).map(|i| bytes(&arena, i, i as u8)).collect();
    std::thread::spawn(move || drop(blocks)).join().unwrap();
    assert!(arena.stats().allocated < 2 * MIB as u64);
    Ok(())
}

fn limit_refuses_and_has_room_again() -> Verdict {
    let arena = heap().arena("").limit(8 * MIB as u64).build().unwrap();
    let mut blocks = Vec::new();
    while blocks.len() < 100 {
        let mut block = VecIn::<u8, Arena>::new_in(arena.clone());
        if block.try_reserve(100_000).is_err() {
            break;
        }
        blocks.push(block);
    }
    assert!((70..100).contains(&blocks.len()));
    let stats = arena.stats();
    assert!(stats.pages <= 8 * MIB as u64 && stats.over_limit > 0);
    drop(blocks);
    assert_eq!(bytes(&arena, 7 * MIB, 1).len(), 7 * MIB);
    Ok(())
}

fn too_large_is_refused() -> Verdict {
    let arena = plain();
    assert!(arena.allocate_bytes(usize::MAX, 1, false).is_null());
    assert!(arena.allocate_bytes(usize::MAX / 2, 1, false).is_null());
    assert!(arena.allocate_bytes(1 << 40, 4096, false).is_null());
    let mut block = bytes(&arena, 10, 1);
    assert!(block.try_reserve(isize::MAX as usize).is_err());
    assert_eq!(block.as_slice(), [1; 10]);
    Ok(())
}

fn foreign_memory_is_told_apart() -> Verdict {
    let (arena, other) = (plain(), plain());
    let (theirs, ours) = (Box::new(7u64), BoxIn::new_in([7u8; 100], arena.clone()));
    let owner = |addr: usize| Arena::with_owner_of(heap(), addr, Arena::id);
    assert_eq!(owner((&raw const *ours).addr()), Some(arena.id()));
    assert_eq!(owner((&raw const *theirs).addr()), None);
    assert_ne!(arena.id(), other.id());
    Ok(())
}

fn ended_arena_is_told_apart() -> Verdict {
    let arena = plain();
    let id = arena.id();
    drop((bytes(&arena, 100_000, 1), arena));
    assert!(Arena::with(id, |_| ()).is_none());
    assert_ne!(plain().id(), id);
    Ok(())
}

fn arenas_that_cannot_be_are_refused() -> Verdict {
    let before = Arena::count();
    let name = "a name of more than thirty-two bytes";
    let refused = |arena: allocator::ArenaBuilder| arena.build().unwrap_err();
    assert_eq!(refused(heap().arena(name)), ArenaError::Name(name.len()));
    let interleaved = heap().arena("").placement(Placement::Interleave(2));
    assert_eq!(refused(interleaved), ArenaError::Interleave);
    let all: Vec<Arena> = std::iter::from_fn(|| heap().arena("").build().ok()).collect();
    assert_eq!(before + all.len(), MAX_ARENAS);
    assert_eq!(refused(heap().arena("")), ArenaError::TooMany);
    drop(all);
    assert_eq!(Arena::count(), before);
    Ok(())
}

fn settings_that_are_none_are_named() -> Verdict {
    let said = |text| settings::check(text).unwrap_err().to_string();
    assert!(said("placment:dc").contains("did you mean `placement`?"));
    assert!(said("placement:moon").contains("moon"));
    Ok(())
}

fn statistics_count() -> Verdict {
    let before = heap().stats();
    let arena = plain();
    let block = bytes(&arena, 10 * MIB, 1);
    assert!(heap().stats().allocated >= before.allocated + 10 * MIB as u64);
    let stats = arena.stats();
    assert!(stats.allocated >= 10 * MIB as u64 && stats.pages >= 10 * MIB as u64);
    drop((arena, block));
    assert_eq!(heap().stats().arenas, before.arenas);
    Ok(())
}

fn blocks_lie_on_extents() -> Verdict {
    process::broker().ok_or("no broker")?;
    let build = |placement| heap().arena("").placement(placement).build().unwrap();
    let (arena, dram) = (build(Placement::Dc), build(Placement::Dram));
    let live = || heap().stats().usage.extent_live;
    let before = live();
    let in_dram = bytes(&dram, 10 * MIB, 1);
    assert!(live() < before + 10 * MIB as u64);
    let on_extents = bytes(&arena, 10 * MIB, 1);
    assert!(live() >= before + 10 * MIB as u64);
    drop((in_dram, on_extents));
    Ok(())
}

const TAG: &str = "7f3e2a90-0000-4000-8000-000000000001";
const SHARED_TAG: &str = "7f3e2a90-0000-4000-8000-000000000002";
const UNKNOWN_TAG: &str = "7f3e2a90-0000-4000-8000-000000000003";

fn tag(text: &str) -> Tag {
    text.parse().expect("a tag")
}

fn tagged_arenas_lie_on_their_tag() -> Verdict {
    assert!("seven".parse::<Tag>().is_err());
    process::broker().ok_or("no broker")?;
    let build = |builder: allocator::ArenaBuilder| {
        let failing = builder.on_exhausted(OnExhausted::Fail);
        failing.build().unwrap()
    };
    let arena = build(heap().arena("").tag(tag(TAG)));
    let unknown = build(heap().arena("").tag(tag(UNKNOWN_TAG)));
    let before = heap().stats().usage.extent_live;
    let block = bytes(&arena, 5 * MIB, 7);
    assert!(heap().stats().usage.extent_live >= before + 5 * MIB as u64);
    assert!(arena.allocate_bytes(5 * MIB, 1, false).is_null());
    assert!(unknown.allocate_bytes(MIB, 1, false).is_null());
    assert_eq!(bytes(&plain(), 10 * MIB, 7).len(), 10 * MIB);
    drop(block);
    Ok(())
}

fn shared_extents_are_read() -> Verdict {
    process::broker().ok_or("no broker")?;
    // SAFETY: written before the broker offered it, and by nobody since.
    let open = |text| unsafe { Arena::open_shared(tag(text)) };
    let (first, second) = (open(SHARED_TAG).unwrap(), open(SHARED_TAG).unwrap());
    assert_eq!(first.len(), 4 * MIB);
    assert!(first.as_ptr() != second.as_ptr() && first[..] == second[..]);
    for (number, part) in (1..).zip(first.chunks(MIB)) {
        assert!(part.iter().all(|byte| *byte == number));
    }
    assert!(!first.is_lost());
    drop(first);
    assert_eq!(second[0], 1);
    let refused = |text| matches!(open(text), Err(SharedError::Refused(_)));
    assert!(refused(UNKNOWN_TAG) && refused(TAG));
    Ok(())
}

fn pins_hold_and_end() -> Verdict {
    let arena = plain();
    let block = bytes(&arena, 3 * MIB, 1);
    let pin = heap().pin(block.as_ptr(), block.len()).unwrap();
    assert!(heap().stats().pinned >= 3 * MIB as u64);
    drop(pin);
    assert_eq!(heap().stats().pinned, 0);
    let here = 0u8;
    let foreign = heap().pin(&raw const here, 1);
    assert!(matches!(foreign, Err(PinError::Foreign { .. })));
    let empty = heap().pin(block.as_ptr(), 0);
    assert!(matches!(empty, Err(PinError::Empty)));
    Ok(())
}

fn pressure_is_heard() -> Verdict {
    process::broker().ok_or("no broker")?;
    let fails = heap().arena("fails").priority(-1);
    let fails = fails.on_pressure(|_| std::panic::resume_unwind(Box::new("on purpose")));
    let fails = fails.build().unwrap();
    let heard = Arc::new(AtomicU64::new(0));
    let cache: Arc<Mutex<Vec<VecIn<u8, Arena>>>> = Arc::default();
    // What is in the arena owns the arena.
    let (hears, weak) = (Arc::clone(&heard), Arc::downgrade(&cache));
    let arena = heap().arena("cache").on_pressure(move |pressure| {
        hears.store(pressure.bytes, Ordering::Release);
        let _scratch = vec![0u8; 100_000];
        if let Some(cache) = weak.upgrade() {
            cache.lock().unwrap().clear();
        }
    });
    let arena = arena.on_exhausted(OnExhausted::Dram).build().unwrap();
    let blocks = (0..160).map(|i| bytes(&arena, MIB, i as u8));
    cache.lock().unwrap().extend(blocks);
    let failures = heap().stats().callback_panics;
    release(200 * MIB)?;
    assert!(heard.load(Ordering::Acquire) > 0 && cache.lock().unwrap().is_empty());
    assert_eq!(heap().stats().callback_panics, failures + 1);
    drop(fails);
    Ok(())
}

fn receipt_says_what_came_back() -> Verdict {
    let receipt = release(8 * MIB)?;
    assert_eq!((receipt.asked, receipt.returned), (8 << 20, 8 << 20));
    Ok(())
}

fn live_memory_keeps_its_content() -> Verdict {
    process::broker().ok_or("no broker")?;
    let arena = plain();
    let mut numbers = VecIn::with_capacity_in(4 * MIB, arena);
    numbers.extend((0..4 * MIB as u32).map(|i| i.wrapping_mul(7)));
    release(256 * MIB)?;
    let kept = |(i, number): (usize, &u32)| *number == (i as u32).wrapping_mul(7);
    assert!(numbers.iter().enumerate().all(kept));
    Ok(())
}

macro_rules! behaviours {
    ($($name:ident)*) => {
        [$((stringify!($name), $name as fn() -> Verdict)),*]
    };
}

fn main() -> ExitCode {
    let behaviours = behaviours! {
        arena_is_made_and_ended
        blocks_hold_what_is_written
        blocks_are_aligned_and_zeroed
        resizing_keeps_content
        other_threads_free
        limit_refuses_and_has_room_again
        too_large_is_refused
        foreign_memory_is_told_apart
        ended_arena_is_told_apart
        arenas_that_cannot_be_are_refused
        settings_that_are_none_are_named
        statistics_count
        blocks_lie_on_extents
        tagged_arenas_lie_on_their_tag
        shared_extents_are_read
        pins_hold_and_end
        pressure_is_heard
        receipt_says_what_came_back
        live_memory_keeps_its_content
    };
    let mut failures = 0;
    for (name, run) in behaviours {
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(())) => println!("ok {name}"),
            Ok(Err(reason)) => println!("SKIPPED {name}: {reason}"),
            Err(_) => {
                println!("FAILED {name}: see stderr");
                failures += 1;
            }
        }
    }
    ExitCode::from(u8::from(failures > 0))
}
