//! Who needs which original: the books of one family, without any I/O.
//!
//! An *original* is a granule of the window as it was when its owner forked.
//! A *member* is an address space that may still read it: the owner (the
//! *root*) and every descendant, in any generation. A member that touches a
//! granule gets a copy and needs the original no more; when nobody needs it,
//! it is free.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use crate::broker::protocol::{GRANULE, SharedRun};

/// The family's number for a member; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct MemberId(u32);

impl MemberId {
    /// The process that owned the originals.
    pub(super) const ROOT: Self = Self(0);
}

/// The books. Places are addresses of granules in the members, which have the
/// same in all of them; originals are offsets into the window.
#[derive(Debug, Default)]
pub(super) struct Family {
    /// What each member needs: original by place.
    members: BTreeMap<MemberId, BTreeMap<u64, u64>>,
    /// How many members need each original.
    holders: BTreeMap<u64, u32>,
    /// Places at which the root maps the original itself again.
    restored: BTreeSet<u64>,
    /// Places of a member that nobody can fill: it was made by a clone that
    /// its parent's allocator did not see, while the root mapped them again.
    lost: BTreeMap<MemberId, BTreeSet<u64>>,
    next: u32,
    /// Originals that only the root needs may be among them.
    changed: bool,
}

impl Family {
    /// A family of the root alone, which needs nothing.
    pub(super) fn new() -> Self {
        let mut family = Self::default();
        family.members.insert(MemberId::ROOT, BTreeMap::new());
        family.next = 1;
        family
    }

    /// The root has made originals of what it had.
    pub(super) fn share(&mut self, runs: &[SharedRun]) {
        for (place, original) in runs.iter().flat_map(granules) {
            self.need(MemberId::ROOT, place, original);
        }
        self.restored.clear();
    }

    fn need(&mut self, member: MemberId, place: u64, original: u64) {
        if let Some(needs) = self.members.get_mut(&member)
            && needs.insert(place, original).is_none()
        {
            *self.holders.entry(original).or_default() += 1;
        }
    }

    /// `parent` has forked: the child needs what its parent does.
    pub(super) fn born(&mut self, parent: MemberId) -> MemberId {
        let needs = self.members.get(&parent).cloned().unwrap_or_default();
        for original in needs.values() {
            *self.holders.entry(*original).or_default() += 1;
        }
        let child = MemberId(self.next);
        self.next += 1;
        self.members.insert(child, needs);
        let lost = match parent {
            MemberId::ROOT => self.restored.clone(),
            _ => self.lost.get(&parent).cloned().unwrap_or_default(),
        };
        self.lost.insert(child, lost);
        child
    }

    /// The original that `member` needs at `place`.
    pub(super) fn original(&self, member: MemberId, place: u64) -> Option<u64> {
        self.members.get(&member)?.get(&place).copied()
    }

    /// Whether `member` needs any original.
    pub(super) fn needs_any(&self, member: MemberId) -> bool {
        self.members.get(&member).is_some_and(|n| !n.is_empty())
    }

    /// `member` has its copy. Returns the original if nobody needs it any more.
    pub(super) fn filled(&mut self, member: MemberId, place: u64) -> Option<u64> {
        let original = self.members.get_mut(&member)?.remove(&place)?;
        self.needed_less(original)
    }

    /// `member` is gone. Returns the originals that nobody needs any more.
    pub(super) fn died(&mut self, member: MemberId) -> Vec<u64> {
        self.lost.remove(&member);
        let needs = self.members.remove(&member).unwrap_or_default();
        let free = needs.into_values().filter_map(|o| self.needed_less(o));
        free.collect()
    }

    fn needed_less(&mut self, original: u64) -> Option<u64> {
        let count = self.holders.get_mut(&original)?;
        *count -= 1;
        self.changed = true;
        if *count > 0 {
            return None;
        }
        self.holders.remove(&original);
        Some(original)
    }

    /// Whether the members are all gone.
    pub(super) fn is_extinct(&self) -> bool {
        self.members.is_empty()
    }

    /// Takes what only the root needs out of the books: it may map it again.
    pub(super) fn take_restorable(&mut self) -> Vec<SharedRun> {
        let mut runs = Vec::new();
        if !std::mem::take(&mut self.changed) {
            return runs;
        }
        let Some(needs) = self.members.get_mut(&MemberId::ROOT) else {
            return runs;
        };
        let holders = &mut self.holders;
        needs.retain(|&place, original| {
            let alone = holders.get(original) == Some(&1);
            if alone {
                holders.remove(original);
                self.restored.insert(place);
                push_run(&mut runs, place, *original);
            }
            !alone
        });
        runs
    }

    /// What [`Self::take_restorable`] took can't be mapped by the root after all.
    pub(super) fn put_back(&mut self, runs: &[SharedRun]) {
        for (place, original) in runs.iter().flat_map(granules) {
            self.restored.remove(&place);
            self.need(MemberId::ROOT, place, original);
        }
    }

    /// Whether the root maps the original at `place` itself, or is about to.
    pub(super) fn is_restored(&self, place: u64) -> bool {
        self.restored.contains(&place)
    }

    /// Whether nobody can say what `member` should see at `place`.
    pub(super) fn is_lost(&self, member: MemberId, place: u64) -> bool {
        self.lost
            .get(&member)
            .is_some_and(|lost| lost.contains(&place))
    }

    /// Everybody who needs an original, and where.
    pub(super) fn holders(&self, original: u64) -> Vec<(MemberId, u64)> {
        let at = |(member, needs): (&MemberId, &BTreeMap<u64, u64>)| {
            let place = needs.iter().find(|(_, o)| **o == original)?;
            Some((*member, *place.0))
        };
        match self.holders.contains_key(&original) {
            true => self.members.iter().filter_map(at).collect(),
            false => Vec::new(),
        }
    }
}

/// Place and original of each granule of a run.
fn granules(run: &SharedRun) -> impl Iterator<Item = (u64, u64)> + use<> {
    let run = *run;
    (0..run.len / GRANULE).map(move |i| (run.addr + i * GRANULE, run.offset + i * GRANULE))
}

/// Adds a granule, to the last run if it continues that.
pub(super) fn push_run(runs: &mut Vec<SharedRun>, addr: u64, offset: u64) {
    match runs.last_mut() {
        Some(last) if last.addr + last.len == addr && last.offset + last.len == offset => {
            last.len += GRANULE;
        }
        _ => runs.push(SharedRun {
            addr,
            offset,
            len: GRANULE,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x7000_0000_0000;

    fn run(first: u64, count: u64) -> SharedRun {
        SharedRun {
            addr: BASE + first * GRANULE,
            offset: first * GRANULE,
            len: count * GRANULE,
        }
    }

    fn place(i: u64) -> u64 {
        BASE + i * GRANULE
    }

    #[test]
    fn an_original_is_free_when_the_last_of_all_generations_has_its_copy() {
        let mut family = Family::new();
        family.share(&[run(0, 2)]);
        let child = family.born(MemberId::ROOT);
        let grandchild = family.born(child);
        assert_eq!(family.filled(MemberId::ROOT, place(0)), None);
        assert_eq!(family.filled(MemberId::ROOT, place(0)), None, "twice");
        // A child of today has the copy already.
        let late = family.born(MemberId::ROOT);
        assert_eq!(family.original(late, place(0)), None);
        assert_eq!(family.original(late, place(1)), Some(GRANULE));
        assert_eq!(family.filled(child, place(0)), None);
        assert_eq!(family.holders(0), [(grandchild, place(0))]);
        assert_eq!(family.filled(grandchild, place(0)), Some(0));
        assert_eq!(family.holders(0), []);
        assert!(family.died(child).is_empty());
        assert!(family.died(MemberId::ROOT).is_empty());
        assert!(family.died(late).is_empty());
        assert_eq!(family.died(grandchild), [GRANULE]);
        assert!(family.is_extinct());
    }

    #[test]
    fn the_root_maps_again_what_it_alone_needs() {
        let mut family = Family::new();
        family.share(&[run(0, 4)]);
        let child = family.born(MemberId::ROOT);
        assert_eq!(family.take_restorable(), []);
        family.filled(child, place(0));
        family.filled(child, place(1));
        family.filled(MemberId::ROOT, place(1));
        assert_eq!(family.take_restorable(), [run(0, 1)]);
        assert!(family.is_restored(place(0)));
        let unseen = family.born(MemberId::ROOT);
        assert!(family.is_lost(unseen, place(0)) && !family.is_lost(child, place(0)));
        family.died(unseen);
        assert_eq!(family.original(MemberId::ROOT, place(0)), None);
        assert!(family.died(child).is_empty());
        assert_eq!(family.take_restorable(), [run(2, 2)]);
        // It could not be told.
        family.put_back(&[run(2, 2)]);
        assert!(!family.is_restored(place(2)));
        assert_eq!(family.filled(MemberId::ROOT, place(2)), Some(2 * GRANULE));
        // The next fork makes another original of the same place.
        family.share(&[run(0, 1)]);
        assert!(!family.is_restored(place(0)));
        assert_eq!(family.original(MemberId::ROOT, place(0)), Some(0));
    }
}
