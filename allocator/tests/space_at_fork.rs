//! What a space hands out while a fork is near: a child inherits no extent, so
//! nothing may come to lie on one any more.

mod common;

use allocator::source::{ExtentSource, Ranges, SharedRun, WindowRange};
use allocator::space::{Backing, GRANULE, PAGE, Space, Tier};
use common::MemfdSource;

const WHOLE: WindowRange = WindowRange {
    offset: 0,
    len: 4 * GRANULE as u64,
};

/// A space with four extents that nobody uses.
fn space() -> &'static Space {
    let (window, len) = MemfdSource::leak(4).window();
    let space = Box::leak(Box::new(Space::new()));
    space.open().unwrap();
    // SAFETY: a window that stays for ever and that nobody else uses.
    unsafe { space.open_window(window, len) }.unwrap();
    lend(space);
    space
}

fn lend(space: &Space) {
    let mut lent = Ranges::EMPTY;
    lent.push(WHOLE);
    assert_eq!(space.lend(&lent), WHOLE.len);
}

#[test]
fn closed_extents_take_nothing_in() {
    let space = space();
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

/// The books of a process that shares what it has on extents and forks; after
/// that they are its child's, to which it is ancestor `line`.
fn share_and_fork(space: &Space, line: u8) {
    let all = space.pick_sharing(0, usize::MAX).unwrap();
    space.end_covering(all, true);
    space.end_sharing();
    space.disown_extents(line);
}

/// A grandchild hears of its grandparent's copies where its parent has shared
/// something else since.
#[test]
fn an_ancestor_speaks_for_what_it_left_only() {
    let space = space();
    let alloc = || space.alloc(Tier::Extent, GRANULE, PAGE, true).unwrap().addr;
    let run = |addr| SharedRun {
        addr,
        offset: 0,
        len: GRANULE,
    };
    let old = alloc();
    share_and_fork(space, 0);
    lend(space);
    let new = alloc();
    share_and_fork(space, 1);
    let backings = || [old, new].map(|at| space.backing_of(at));
    let left = [0, 1].map(|line| Some(Backing::Inherited(line)));
    assert_eq!(backings(), left);

    space.inherited_filled(&run(new), 0);
    space.inherited_filled(&run(old), 1);
    // What is said of this process's own originals.
    space.filled(&run(old));
    assert_eq!(backings(), left);
    space.inherited_filled(&run(old), 0);
    space.inherited_filled(&run(new), 1);
    assert_eq!(backings(), [Some(Backing::Dram); 2]);
    assert_eq!(space.usage().inherited, 0);

    // Nor of what it has shared itself.
    lend(space);
    let mine = alloc();
    let all = space.pick_sharing(0, usize::MAX).unwrap();
    space.end_covering(all, true);
    space.end_sharing();
    let original = space.backing_of(mine);
    assert!(matches!(original, Some(Backing::Original(_))));
    space.inherited_filled(&run(mine), 0);
    assert_eq!(space.backing_of(mine), original);
    space.filled(&run(mine));
    assert_eq!(space.backing_of(mine), Some(Backing::Dram));
}
