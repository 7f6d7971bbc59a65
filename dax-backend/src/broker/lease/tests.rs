//! The table, step by step and at random.

use super::*;
use crate::extent::ExtentTag;

const BASE: u64 = 0x1000_0000;

fn extent(first: u64, granules: u64) -> Extent {
    Extent::untagged(DpaRange {
        start: Dpa(BASE + first * GRANULE),
        len: granules * GRANULE,
    })
}

fn tagged(first: u64, granules: u64, tag: u8) -> Extent {
    Extent {
        tag: ExtentTag([tag; 16]),
        ..extent(first, granules)
    }
}

/// A clean table of 64 granules with these extents.
fn table(extents: &[Extent]) -> LeaseTable {
    let span = DpaRange {
        start: Dpa(BASE),
        len: 64 * GRANULE,
    };
    let mut table = LeaseTable::new(span, GRANULE, Ledger::new(64, BASE).unwrap());
    table.sync(extents, |_| true, |_| false);
    table
}

fn granules_of(ranges: &[WindowRange]) -> Vec<usize> {
    ranges.iter().flat_map(|range| granules(*range)).collect()
}

const A: ClientId = ClientId(1);
const B: ClientId = ClientId(2);

#[test]
fn grants_fill_one_extent_before_touching_the_next() {
    let mut table = table(&[extent(0, 4), extent(8, 4)]);
    assert_eq!(granules_of(&table.grant(A, GRANULE, ExtentTag::NULL)), [0]);
    assert_eq!(
        granules_of(&table.grant(B, 2 * GRANULE, ExtentTag::NULL)),
        [1, 2]
    );
    table.give_back(A, range_of(0, 1)).unwrap();
    // Extent 0 is the fuller one; its clean granule goes before extent 8.
    assert_eq!(granules_of(&table.grant(A, GRANULE, ExtentTag::NULL)), [3]);
    assert_eq!(granules_of(&table.grant(A, GRANULE, ExtentTag::NULL)), [8]);
}

#[test]
fn what_was_leased_is_wiped_before_it_is_leased_again() {
    let mut table = table(&[extent(0, 2)]);
    table.grant(A, 2 * GRANULE, ExtentTag::NULL);
    table.give_back(A, range_of(0, 2)).unwrap();
    assert_eq!(table.grant(B, GRANULE, ExtentTag::NULL), []);
    assert_eq!(table.next_dirty(), Some((range_of(0, 2), false)));
    table.zeroed(range_of(0, 1));
    assert_eq!(
        granules_of(&table.grant(B, 2 * GRANULE, ExtentTag::NULL)),
        [0]
    );
}

#[test]
fn huge_pages_outlive_a_lease() {
    let mut table = table(&[extent(0, 3)]);
    table.warmed(GRANULE);
    // The warm one goes first.
    assert_eq!(
        granules_of(&table.grant(A, 3 * GRANULE, ExtentTag::NULL)),
        [1, 0, 2]
    );
    table.end(A);
    assert_eq!(table.next_dirty(), Some((range_of(0, 1), false)));
    table.zeroed(range_of(0, 1));
    assert_eq!(table.next_dirty(), Some((range_of(1, 1), true)));
    table.zeroed(range_of(1, 2));
    assert_eq!((table.counts().warm, table.counts().clean), (1, 2));
    // What is leased meanwhile is not called warm, nor what is dirty clean.
    table.grant(B, GRANULE, ExtentTag::NULL);
    table.warmed(GRANULE);
    assert_eq!(table.counts().warm, 0);
    table.grant(B, 2 * GRANULE, ExtentTag::NULL);
    table.end(B);
    table.warmed(0);
    assert_eq!(table.counts().dirty, 3);
}

#[test]
fn new_capacity_is_dirty_unless_the_device_promises_zeroes() {
    let mut table = table(&[]);
    assert_eq!(
        table.sync(&[extent(0, 2)], |_| false, |_| false).gained,
        2 * GRANULE
    );
    assert_eq!(table.grant(A, GRANULE, ExtentTag::NULL), []);
}

#[test]
fn only_the_holder_gives_back_and_all_of_it_or_nothing() {
    let mut table = table(&[extent(0, 4)]);
    table.grant(A, 2 * GRANULE, ExtentTag::NULL);
    let foreign = LeaseError::NotLeased { offset: 0 };
    assert_eq!(table.give_back(B, range_of(0, 1)), Err(foreign));
    let partly = LeaseError::NotLeased {
        offset: 2 * GRANULE,
    };
    assert_eq!(table.give_back(A, range_of(0, 3)), Err(partly));
    assert_eq!(table.counts().leased, 2);
    for (offset, len) in [(1, GRANULE), (0, GRANULE - 1), (0, 0)] {
        let error = table.give_back(A, WindowRange { offset, len });
        assert_eq!(error, Err(LeaseError::Misaligned { offset, len }));
    }
    for (offset, len) in [
        (u64::MAX - GRANULE + 1, GRANULE),
        (63 * GRANULE, 2 * GRANULE),
    ] {
        let error = table.give_back(A, WindowRange { offset, len });
        assert_eq!(error, Err(LeaseError::Outside { offset, len }));
    }
}

#[test]
fn a_forced_release_names_the_leases_it_hit() {
    let mut table = table(&[extent(0, 4), extent(8, 2)]);
    table.grant(A, 2 * GRANULE, ExtentTag::NULL);
    table.grant(B, 2 * GRANULE, ExtentTag::NULL);
    let lost = table.sync(&[extent(8, 2)], |_| true, |_| false).lost;
    assert_eq!(lost, [(A, range_of(0, 2)), (B, range_of(2, 2))]);
    assert_eq!((table.counts().leased, table.counts().lost), (0, 4));
}

#[test]
fn what_is_lost_belongs_to_nobody_until_it_is_let_go_of() {
    let mut table = table(&[extent(0, 4)]);
    table.grant(A, 2 * GRANULE, ExtentTag::NULL);
    table.grant(B, 2 * GRANULE, ExtentTag::NULL);
    table.sync(&[], |_| true, |_| false);
    // Back again, while both still map what they had.
    assert_eq!(table.sync(&[extent(0, 4)], |_| true, |_| false).gained, 0);
    assert_eq!(
        (table.next_dirty(), table.can_grant(ExtentTag::NULL)),
        (None, false)
    );
    let foreign = LeaseError::NotLeased { offset: 0 };
    assert_eq!(table.give_back(B, range_of(0, 2)), Err(foreign));
    assert_eq!(table.give_back(A, range_of(0, 2)), Ok(0));
    assert_eq!(table.end(B), 0);
    assert_eq!(table.next_dirty(), Some((range_of(0, 4), false)));
}

#[test]
fn what_was_taken_and_offered_again_is_lost_and_not_zero() {
    let mut table = table(&[extent(0, 4)]);
    table.grant(A, 2 * GRANULE, ExtentTag::NULL);
    let synced = table.take(&[extent(1, 2).range]);
    let lost = table.sync(&[extent(0, 4)], |_| false, |_| false);
    assert_eq!(lost.after(synced).lost, [(A, range_of(1, 1))]);
    let counts = table.counts();
    assert_eq!((counts.leased, counts.lost), (1, 1));
    assert_eq!((counts.dirty, counts.clean), (1, 1));
}

#[test]
fn what_is_shared_when_it_is_let_go_of_is_not_wiped() {
    let mut table = table(&[extent(0, 2)]);
    table.grant(A, 2 * GRANULE, ExtentTag::NULL);
    table.sync(&[], |_| true, |_| false);
    let shared = Extent {
        shared_seq: 1,
        ..tagged(0, 2, 7)
    };
    table.sync(&[shared], |_| false, |_| false);
    table.give_back(A, range_of(0, 1)).unwrap();
    table.end(A);
    assert_eq!(table.next_dirty(), None);
    assert_eq!((table.counts().shared, table.counts().lost), (2, 0));
}

#[test]
fn what_is_broken_goes_to_nobody_but_the_device() {
    let mut table = table(&[extent(0, 2)]);
    table.broke(0);
    assert_eq!(
        granules_of(&table.grant(A, 2 * GRANULE, ExtentTag::NULL)),
        [1]
    );
    table.give_back(A, range_of(1, 1)).unwrap();
    assert_eq!(table.mark_free(2 * GRANULE), GRANULE);
    table.mark_range(&extent(0, 2).range, false);
    assert_eq!(granules_of(&table.releasable()[0].1), [0, 1]);
    table.sync(&[], |_| true, |_| false);
    table.sync(&[extent(0, 2)], |_| true, |_| false);
    assert_eq!(table.counts().clean, 2);
}

#[test]
fn the_ends_of_a_misaligned_extent_are_not_leased_and_can_go_back() {
    let mut table = table(&[]);
    let odd = DpaRange {
        start: Dpa(BASE + GRANULE / 2),
        len: 2 * GRANULE,
    };
    table.sync(&[Extent::untagged(odd)], |_| true, |_| false);
    assert_eq!(
        granules_of(&table.grant(A, 8 * GRANULE, ExtentTag::NULL)),
        [1]
    );
    let stranded = table.stranded(&odd);
    assert_eq!(stranded.iter().map(|r| r.len).sum::<u64>(), GRANULE);
}

#[test]
fn release_takes_the_emptiest_extent_from_its_end() {
    let mut table = table(&[extent(0, 4), extent(8, 4)]);
    table.grant(A, GRANULE, ExtentTag::NULL);
    assert_eq!(table.mark_free(2 * GRANULE), 2 * GRANULE);
    let parts = table.releasable();
    assert_eq!(parts.len(), 1);
    assert_eq!(granules_of(&parts[0].1), [10, 11]);
    // What is marked is not leased any more.
    assert_eq!(
        granules_of(&table.grant(B, 64 * GRANULE, ExtentTag::NULL)),
        [1, 2, 3, 8, 9]
    );
}

#[test]
fn a_tag_goes_back_whole_or_not_at_all() {
    let mut table = table(&[tagged(0, 2, 7), tagged(4, 2, 7)]);
    assert_eq!(table.mark_free(2 * GRANULE), 0);
    table.grant(A, GRANULE, ExtentTag([7; 16]));
    assert_eq!(table.mark_range(&extent(4, 1).range, false).len(), 2);
    assert_eq!(table.releasable(), []);
    assert_eq!(table.marked_leases(), [(A, range_of(0, 1))]);
    table.give_back(A, range_of(0, 1)).unwrap();
    let spans: Vec<u64> = table.releasable().iter().map(|(r, _)| r.len).collect();
    assert_eq!(spans, [2 * GRANULE, 2 * GRANULE]);
}

#[test]
fn large_blocks_go_back_whole() {
    let span = DpaRange {
        start: Dpa(BASE),
        len: 64 * GRANULE,
    };
    let mut table = LeaseTable::new(span, 4 * GRANULE, Ledger::new(64, BASE).unwrap());
    table.sync(&[extent(0, 8)], |_| true, |_| false);
    table.grant(A, 5 * GRANULE, ExtentTag::NULL);
    table.give_back(A, range_of(0, 3)).unwrap();
    assert_eq!(table.mark_free(GRANULE), 0);
    table.give_back(A, range_of(3, 1)).unwrap();
    assert_eq!(table.mark_free(GRANULE), 4 * GRANULE);
    assert_eq!(granules_of(&table.releasable()[0].1), [0, 1, 2, 3]);
}

#[test]
fn a_client_keeps_what_it_claims_and_claims_only_what_it_has() {
    let mut table = table(&[extent(0, 8)]);
    table.grant(A, 4 * GRANULE, ExtentTag::NULL);
    table.grant(B, 2 * GRANULE, ExtentTag::NULL);
    let lie = LeaseError::NotLeased {
        offset: 4 * GRANULE,
    };
    assert_eq!(table.settle_claims(A, &[range_of(2, 3)]), Err(lie));
    assert_eq!(table.held(A).0, 4 * GRANULE);
    assert_eq!(
        table.settle_claims(A, &[range_of(1, 1), range_of(3, 1)]),
        Ok(())
    );
    assert_eq!(
        (table.held(A).0, table.held(B).0),
        (2 * GRANULE, 2 * GRANULE)
    );
    assert_eq!(table.counts().dirty, 2);
}

#[test]
fn a_new_table_goes_on_where_the_ledger_ends() {
    let mut old = table(&[extent(0, 8)]);
    old.warmed(GRANULE);
    old.grant(A, 3 * GRANULE, ExtentTag::NULL);
    old.grant(B, GRANULE, ExtentTag::NULL);
    old.mark_range(&extent(0, 1).range, true);
    old.mark_range(&extent(2, 1).range, false);
    old.mark_range(&extent(7, 1).range, true);
    old.leave(&[range_of(7, 1)]);
    let file = old.ledger.fd().try_clone_to_owned().unwrap();
    let span = DpaRange {
        start: Dpa(BASE),
        len: 64 * GRANULE,
    };
    let ledger = Ledger::open(file, 64, BASE).unwrap();
    let mut new = LeaseTable::new(span, GRANULE, ledger);
    // The device has taken granule 3 meanwhile, and not granule 7.
    let lost = new
        .sync(&[extent(0, 3), extent(4, 4)], |_| true, |_| false)
        .lost;
    assert_eq!(lost, [(B, range_of(3, 1))]);
    assert_eq!(new.held(A), (3 * GRANULE, Vec::new()));
    let marked: Vec<usize> = (0..8).filter(|i| new.outgoing[*i]).collect();
    assert_eq!(marked, [0, 7]);
    assert_eq!(granules_of(&new.releasable()[0].1), [7]);
    assert_eq!(
        granules_of(&new.grant(B, 8 * GRANULE, ExtentTag::NULL)),
        [4, 5, 6]
    );
}

proptest::proptest! {
    /// Whatever happens, the counts are those of the slots, and an extent's
    /// leased count is what a walk over it finds.
    #[test]
    fn counts_never_drift(steps in proptest::collection::vec((0u8..8, 0usize..24, 1usize..6), 1..80)) {
        let all = [extent(0, 8), extent(8, 8), tagged(20, 4, 3)];
        let mut table = table(&all);
        for (step, index, count) in steps {
            let range = range_of(index, count);
            match step {
                0 => drop(table.grant(A, count as u64 * GRANULE, ExtentTag::NULL)),
                1 => drop(table.grant(B, count as u64 * GRANULE, ExtentTag::NULL)),
                2 => drop(table.give_back(A, range)),
                3 => drop(table.end(B)),
                4 => if let Some((dirty, _)) = table.next_dirty() {
                    table.zeroed(dirty);
                    table.warmed(dirty.offset);
                },
                5 => drop(table.mark_free(count as u64 * GRANULE)),
                6 => table.broke(range.offset),
                _ => drop(table.sync(&all[..index % 4], |_| count % 2 == 0, |_| false)),
            }
            let mut counts = Counts::default();
            for slot in &table.slots {
                if let Some(count) = counts.of(*slot) {
                    *count += 1;
                }
            }
            proptest::prop_assert_eq!(counts, table.counts());
            for index in 0..table.slots.len() {
                let written = table.ledger.slot(index);
                proptest::prop_assert_eq!(written.slot, table.slots[index]);
                proptest::prop_assert_eq!(written.huge, table.huge[index]);
            }
            for extent in &table.extents {
                let leased = extent.slots().filter(|i| matches!(table.slots[*i], Slot::Leased(_)));
                proptest::prop_assert_eq!(leased.count(), extent.leased);
            }
        }
    }
}
