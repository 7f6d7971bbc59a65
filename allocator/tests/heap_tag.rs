//! Arenas with tags: their granules are of their tag and nobody else's are; what
//! a tag lacks waits for the tag, and what an ended arena leaves goes back. One
//! test, because a process has one heap.

mod common;

use std::time::{Duration, Instant};

use allocator::allocator_api2::vec::Vec as VecIn;
use allocator::source::{Ranges, WindowRange};
use allocator::space::{Backing, GRANULE};
use allocator::{Arena, ArenaError, Config, Heap, OnExhausted, Placement, SharedError, Tag};
use common::{MemfdSource, moves};

static HEAP: Heap = Heap::new();
/// Granules without a tag, then so many of each tag.
const UNTAGGED: usize = 32;
const TAGGED: usize = 8;

fn tag(number: u8) -> Tag {
    Tag::from_bytes([number; 16])
}

fn arena(tag: Tag, policy: OnExhausted) -> Arena {
    let arena = HEAP.arena("tagged").tag(tag).on_exhausted(policy);
    arena.build().unwrap()
}

fn filled(arena: &Arena, granules: usize) -> VecIn<u8, Arena> {
    let mut bytes = VecIn::with_capacity_in(granules * GRANULE, arena.clone());
    bytes.resize(granules * GRANULE, 7);
    bytes
}

/// Which granule of the window is behind each granule of a block.
fn places(bytes: &[u8]) -> Vec<Option<usize>> {
    let place = |at: usize| match HEAP.space().backing_of(at) {
        Some(Backing::Extent(offset)) => Some(offset as usize / GRANULE),
        _ => None,
    };
    let start = bytes.as_ptr().addr();
    let granules = (start..start + bytes.len()).step_by(GRANULE);
    granules.map(place).collect()
}

/// Granules of tag 1 or 2 among those of the window.
fn range_of(number: usize) -> std::ops::Range<usize> {
    let first = UNTAGGED + (number - 1) * TAGGED;
    first..first + TAGGED
}

fn soon(what: &str, is: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !is() {
        assert!(Instant::now() < end, "not soon: {what}: {:?}", HEAP.stats());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn arenas_with_tags_have_their_own_extents() {
    let source = MemfdSource::leak(UNTAGGED + 2 * TAGGED);
    source.tag_from(UNTAGGED, tag(1));
    source.tag_from(UNTAGGED + TAGGED, tag(2));
    assert!(HEAP.start(Config {
        placement: Placement::Dc,
        return_after_ms: 100,
        ..Config::DEFAULT
    }));
    // SAFETY: nothing is opened.
    let unattached = unsafe { Arena::open_shared(tag(1)) };
    assert_eq!(unattached.unwrap_err(), SharedError::NoLender);
    HEAP.attach(source).unwrap();

    // Each from its own, and the heap from what has no tag, however much it lacks.
    let (one, two) = (
        arena(tag(1), OnExhausted::Fail),
        arena(tag(2), OnExhausted::Fail),
    );
    let (ones, twos) = (filled(&one, 4), filled(&two, 3));
    let inside = |places: &[Option<usize>], range: std::ops::Range<usize>| {
        places
            .iter()
            .all(|place| place.is_some_and(|p| range.contains(&p)))
    };
    assert!(inside(&places(&ones), range_of(1)), "{:?}", places(&ones));
    assert!(inside(&places(&twos), range_of(2)), "{:?}", places(&twos));
    let plain = HEAP
        .arena("plain")
        .on_exhausted(OnExhausted::Dram)
        .build()
        .unwrap();
    let many = filled(&plain, UNTAGGED + 4);
    let on_tagged = |place: &Option<usize>| place.is_some_and(|p| p >= UNTAGGED);
    assert!(!places(&many).iter().any(on_tagged), "{:?}", places(&many));
    drop(many);

    // A tag that has run out fails, although there is more of the others.
    let mut more = VecIn::<u8, Arena>::new_in(one.clone());
    assert!(more.try_reserve(TAGGED * GRANULE).is_err());
    drop(more);
    assert!(ones.iter().chain(&twos).all(|byte| *byte == 7));

    // Two arenas of one tag share what it has.
    let again = arena(tag(1), OnExhausted::Dram);
    let rest = filled(&again, TAGGED);
    let got = places(&rest);
    assert!(
        got.iter()
            .flatten()
            .all(|place| range_of(1).contains(place)),
        "{got:?}"
    );
    assert!(got.iter().any(Option::is_none), "{got:?}");

    if moves(&HEAP) {
        // What lies in DRAM for want of the tag comes back to it, and to nothing else.
        drop(ones);
        soon("back on the tag's extents", || {
            let got = places(&rest);
            got.iter()
                .flatten()
                .all(|place| range_of(1).contains(place))
                && got.iter().filter(|place| place.is_some()).count() >= TAGGED - 1
        });
        assert!(rest.iter().all(|byte| *byte == 7));
        // A recall of a tag moves what is live off it, and onto no other extent of another kind.
        let mut wanted = Ranges::EMPTY;
        wanted.push(WindowRange {
            offset: (range_of(1).start * GRANULE) as u64,
            len: (TAGGED * GRANULE) as u64,
        });
        source.recall_ranges(1, &wanted);
        assert_eq!(source.lent_of(&wanted), 0);
        assert!(
            places(&rest).iter().all(Option::is_none),
            "{:?}",
            places(&rest)
        );
        assert!(rest.iter().all(|byte| *byte == 7));
        source.restore();
    } else {
        drop(ones);
    }

    // The place of an ended arena goes to one with another tag, its granules do not.
    drop((rest, again, one, twos, two));
    let third = arena(tag(2), OnExhausted::Fail);
    let block = filled(&third, 5);
    assert!(inside(&places(&block), range_of(2)), "{:?}", places(&block));
    drop((block, third));
    let mut tagged = Ranges::EMPTY;
    tagged.push(WindowRange {
        offset: (UNTAGGED * GRANULE) as u64,
        len: (2 * TAGGED * GRANULE) as u64,
    });
    soon("all of the tags given back", || {
        source.lent_of(&tagged) == 0
    });

    // As many tags as there can be, and one more.
    let all: Vec<Arena> = (10..25).map(|n| arena(tag(n), OnExhausted::Fail)).collect();
    assert_eq!(all.len(), 15);
    let refused = HEAP.arena("one too many").tag(tag(99)).build();
    assert_eq!(refused.unwrap_err(), ArenaError::Tags);
    drop(all);
    drop(arena(tag(99), OnExhausted::Fail));
}
