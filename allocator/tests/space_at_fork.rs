//! What a space hands out while a fork is near: a child inherits no extent, so
//! nothing may come to lie on one any more.

mod common;

use allocator::source::{ExtentSource, Ranges, WindowRange};
use allocator::space::{Backing, GRANULE, PAGE, Space, Tier};
use common::MemfdSource;

const WHOLE: WindowRange = WindowRange {
    offset: 0,
    len: 4 * GRANULE as u64,
};

#[test]
fn closed_extents_take_nothing_in() {
    let (window, len) = MemfdSource::leak(4).window();
    let space = Box::leak(Box::new(Space::new()));
    space.open().unwrap();
    // SAFETY: a window that stays for ever and that nobody else uses.
    unsafe { space.open_window(window, len) }.unwrap();
    let mut lent = Ranges::EMPTY;
    lent.push(WHOLE);
    assert_eq!(space.lend(&lent), WHOLE.len);
    let alloc = |len| space.alloc(Tier::Extent, len, PAGE, true).unwrap().addr;
    let on_extent = |at| matches!(space.backing_of(at), Some(Backing::Extent(_)));

    // One granule partly used, and one mapped and idle.
    let used = alloc(PAGE);
    let idle = alloc(GRANULE);
    assert!(on_extent(used) && on_extent(idle));
    space.free(idle, GRANULE);

    space.set_extents_closed(true);
    for len in [PAGE, 16 * PAGE, GRANULE, 3 * GRANULE] {
        assert!(!on_extent(alloc(len)), "{len:#x}");
    }
    assert!(space.alloc_at(Tier::Extent, used + PAGE, PAGE).is_none());

    space.set_extents_closed(false);
    assert!(space.alloc_at(Tier::Extent, used + PAGE, PAGE).is_some());
    assert!(on_extent(alloc(GRANULE)));
}
