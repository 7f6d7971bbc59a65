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
pub(super) struct MemberId(u64);

impl MemberId {
    /// The process that owned the originals.
    pub(super) const ROOT: Self = Self(0);
}

/// An original that somebody needs.
#[derive(Debug)]
struct Held {
    place: u64,
    count: u32,
}

/// The books. Places are addresses of granules in the members, which have the
/// same in all of them; originals are offsets into the window.
#[derive(Debug, Default)]
pub(super) struct Family {
    /// What each member needs: original by place.
    members: BTreeMap<MemberId, BTreeMap<u64, u64>>,
    /// How many members need each original, and where all of them have it.
    holders: BTreeMap<u64, Held>,
    /// Who was made before the root had said what it shares.
    doubtful: BTreeSet<MemberId>,
    next: u64,
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
    }

    fn need(&mut self, member: MemberId, place: u64, original: u64) {
        if let Some(needs) = self.members.get_mut(&member)
            && needs.insert(place, original).is_none()
        {
            let held = Held { place, count: 0 };
            self.holders.entry(original).or_insert(held).count += 1;
        }
    }

    /// `parent` has forked: the child needs what its parent does, and, if it is
    /// `doubtful`, what nobody knows.
    pub(super) fn born(&mut self, parent: MemberId, doubtful: bool) -> MemberId {
        let needs = self.members.get(&parent).cloned().unwrap_or_default();
        for original in needs.values() {
            if let Some(held) = self.holders.get_mut(original) {
                held.count += 1;
            }
        }
        let child = MemberId(self.next);
        self.next += 1;
        self.members.insert(child, needs);
        if doubtful || self.doubtful.contains(&parent) {
            self.doubtful.insert(child);
        }
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
        self.doubtful.remove(&member);
        let needs = self.members.remove(&member).unwrap_or_default();
        let free = needs.into_values().filter_map(|o| self.needed_less(o));
        free.collect()
    }

    fn needed_less(&mut self, original: u64) -> Option<u64> {
        let held = self.holders.get_mut(&original)?;
        held.count -= 1;
        if held.count > 0 {
            return None;
        }
        self.holders.remove(&original);
        Some(original)
    }

    /// Whether the members are all gone.
    pub(super) fn is_extinct(&self) -> bool {
        self.members.is_empty()
    }

    /// Whether nobody can say all that `member` should see.
    pub(super) fn is_doubtful(&self, member: MemberId) -> bool {
        self.doubtful.contains(&member)
    }

    /// Whether anybody needs an original.
    pub(super) fn is_needed(&self, original: u64) -> bool {
        self.holders.contains_key(&original)
    }

    /// Everybody who needs an original, and where.
    pub(super) fn holders(&self, original: u64) -> Vec<(MemberId, u64)> {
        let Some(Held { place, .. }) = self.holders.get(&original) else {
            return Vec::new();
        };
        let needs = |needs: &BTreeMap<u64, u64>| needs.get(place) == Some(&original);
        let members = self.members.iter().filter(|(_, all)| needs(all));
        members.map(|(member, _)| (*member, *place)).collect()
    }

    /// What nobody but the root needs, in order: place and original.
    pub(super) fn roots_alone(&self) -> impl Iterator<Item = (u64, u64)> {
        let needs = self.members.get(&MemberId::ROOT).into_iter().flatten();
        let alone = |original| {
            self.holders
                .get(original)
                .is_some_and(|held| held.count == 1)
        };
        needs
            .filter(move |(_, original)| alone(original))
            .map(|(place, original)| (*place, *original))
    }

    /// Whether the root, at `place`, is the only one that needs an original.
    pub(super) fn is_roots_alone(&self, place: u64, original: u64) -> bool {
        self.original(MemberId::ROOT, place) == Some(original)
            && self
                .holders
                .get(&original)
                .is_some_and(|held| held.count == 1)
    }
}

/// Place and original of each granule of a run.
pub(super) fn granules(run: &SharedRun) -> impl Iterator<Item = (u64, u64)> + use<> {
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
        let child = family.born(MemberId::ROOT, false);
        let grandchild = family.born(child, false);
        assert_eq!(family.filled(MemberId::ROOT, place(0)), None);
        assert_eq!(family.filled(MemberId::ROOT, place(0)), None, "twice");
        assert!(!family.is_roots_alone(place(1), GRANULE));
        // A child of today has the copy already.
        let late = family.born(MemberId::ROOT, false);
        assert_eq!(family.original(late, place(0)), None);
        assert_eq!(family.original(late, place(1)), Some(GRANULE));
        assert_eq!(family.filled(child, place(0)), None);
        assert_eq!(family.holders(0), [(grandchild, place(0))]);
        assert_eq!(family.filled(grandchild, place(0)), Some(0));
        assert_eq!(family.holders(0), []);
        assert!(family.died(child).is_empty());
        assert!(family.died(late).is_empty());
        assert!(family.died(MemberId::ROOT).is_empty());
        assert_eq!(family.died(grandchild), [GRANULE]);
        assert!(family.is_extinct());
    }

    #[test]
    fn what_only_the_root_needs_can_be_its_own_again() {
        let mut family = Family::new();
        family.share(&[run(0, 2)]);
        let all = [(place(0), 0), (place(1), GRANULE)];
        assert!(family.roots_alone().eq(all));
        assert!(family.is_roots_alone(place(1), GRANULE));
        assert!(!family.is_roots_alone(place(1), 0), "another original");
        let child = family.born(MemberId::ROOT, false);
        assert!(!family.is_roots_alone(place(1), GRANULE));
        family.died(child);
        assert!(family.is_roots_alone(place(1), GRANULE));
        let child = family.born(MemberId::ROOT, false);
        family.filled(MemberId::ROOT, place(0));
        assert!(!family.is_roots_alone(place(0), 0), "the child's alone");
        family.died(child);
    }

    #[test]
    fn who_was_made_too_early_is_doubtful_and_so_are_its_children() {
        let mut family = Family::new();
        family.share(&[run(0, 1)]);
        let early = family.born(MemberId::ROOT, true);
        let grandchild = family.born(early, false);
        let child = family.born(MemberId::ROOT, false);
        let doubtful = [early, grandchild, child].map(|id| family.is_doubtful(id));
        assert_eq!(doubtful, [true, true, false]);
        assert_eq!(family.original(grandchild, place(0)), Some(0));
    }
}
