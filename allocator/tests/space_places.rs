//! Where a space puts runs of pages: close together, and never on each other.

mod common;

use allocator::source::{ExtentSource, Ranges, WindowRange};
use allocator::space::{GRANULE, PAGE, Space, Tier};
use common::MemfdSource;
use proptest::prelude::*;

/// A space with so many granules lent to it, and no DRAM in their place.
fn space(granules: usize) -> &'static Space {
    let (window, len) = MemfdSource::leak(granules).window();
    let space = Box::leak(Box::new(Space::new()));
    space.open().unwrap();
    // SAFETY: a window that stays for ever and that nobody else uses.
    unsafe { space.open_window(window, len) }.unwrap();
    let mut lent = Ranges::EMPTY;
    lent.push(WindowRange {
        offset: 0,
        len: len as u64,
    });
    assert_eq!(space.lend(&lent), len as u64);
    space
}

fn place(space: &Space, len: usize) -> Option<usize> {
    space
        .alloc(Tier::Extent, len, PAGE, false)
        .map(|run| run.addr)
}

/// Runs of 1.2 MiB had a granule each, and two fifths of it stayed empty.
#[test]
fn runs_lie_across_granules() {
    let space = space(6);
    for _ in 0..10 {
        place(space, 300 * PAGE).expect("ten runs of 300 pages fit six granules of 512");
    }
}

/// Idle granules that were not neighbours backed no run of several, which
/// failed with half of the lease unused.
#[test]
fn scattered_idle_granules_make_a_long_run() {
    let space = space(4);
    let runs: Vec<usize> = (0..4).map(|_| place(space, GRANULE).unwrap()).collect();
    space.free(runs[0], GRANULE);
    space.free(runs[2], GRANULE);
    let long = place(space, 2 * GRANULE).expect("two granules are unused");
    for (i, at) in [runs[1], runs[3], long].into_iter().enumerate() {
        // SAFETY: pages that were just handed out.
        unsafe { (at as *mut u8).write_bytes(i as u8 + 1, GRANULE) };
    }
    for (i, at) in [runs[1], runs[3], long].into_iter().enumerate() {
        // SAFETY: as above.
        let bytes = unsafe { core::slice::from_raw_parts(at as *const u8, GRANULE) };
        assert!(bytes.iter().all(|&byte| byte == i as u8 + 1), "run {i}");
    }
    assert!(place(space, PAGE).is_none(), "every granule is full");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    /// Whatever is taken and freed: no page is handed out twice, and what is
    /// said to be zero is.
    #[test]
    fn no_page_is_handed_out_twice(
        steps in prop::collection::vec((any::<bool>(), 1usize..1300, any::<prop::sample::Index>()), 1..150),
    ) {
        let space = space(12);
        let mut runs: Vec<(usize, usize, u64)> = Vec::new();
        for (id, (take, pages, which)) in steps.into_iter().enumerate() {
            if take || runs.is_empty() {
                let Some(run) = space.alloc(Tier::Extent, pages * PAGE, PAGE, false) else {
                    continue;
                };
                let id = id as u64 + 1;
                for page in 0..pages {
                    let word = (run.addr + page * PAGE) as *mut u64;
                    // SAFETY: a page that was just handed out.
                    unsafe {
                        prop_assert!(!run.zeroed || word.read() == 0);
                        word.write(id);
                    }
                }
                runs.push((run.addr, pages, id));
            } else {
                let (addr, pages, id) = runs.swap_remove(which.index(runs.len()));
                for page in 0..pages {
                    // SAFETY: a page that is handed out.
                    prop_assert_eq!(unsafe { ((addr + page * PAGE) as *const u64).read() }, id);
                }
                space.free(addr, pages * PAGE);
            }
        }
    }
}
