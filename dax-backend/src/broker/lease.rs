//! Who holds which granule: the broker's table of capacity. Its only output is
//! the ledger, in which each change is written down.
//!
//! One slot per granule of the window. Slots inside accepted extents go round
//! `Dirty → Clean → (Warm) → Leased → Dirty`, and leave when the extent does;
//! what the device takes from under a lease is `Lost` until its holder lets go.
//! Grants come from the extents that are fullest already, so that the others
//! stay empty and can be given back whole. Capacity with a tag is leased only to
//! who asks for that tag. What is *shared* with other hosts is `Shared` and goes
//! round nothing: it is never leased and never wiped (`sharing.rs`).
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::ledger::{Ledger, SlotEntry};
use super::protocol::{GRANULE, WindowRange};
use crate::address::{Dpa, DpaRange};
use crate::extent::{Extent, ExtentTag};

/// The broker's number for a client; nobody else's while it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ClientId(pub(super) u32);

/// What a granule of the window is at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    /// No accepted capacity.
    Absent,
    /// Free, with bytes of whoever had it before.
    Dirty,
    /// Free and zero.
    Clean,
    /// Free, zero, and present as one huge page.
    Warm,
    /// Leased.
    Leased(ClientId),
    /// Taken from under its lease by the device. Until the client says that it
    /// maps it no more nobody gets it, even if the device lends it anew.
    Lost(ClientId),
    /// Accepted, but faults: only the device may have it.
    Broken,
    /// On its way to the device, which has not answered yet.
    Leaving,
    /// Shared with other hosts: it is mapped read-only, and never leased or wiped.
    Shared,
    /// Taken by the device while it was shared. Nobody gets it before all who
    /// mapped it have let go.
    SharedLost,
}

impl Slot {
    pub(super) fn is_free(self) -> bool {
        matches!(self, Self::Dirty | Self::Clean | Self::Warm)
    }

    fn is_held_by(self, clients: &[ClientId]) -> bool {
        matches!(self, Self::Leased(client) | Self::Lost(client) if clients.contains(&client))
    }
}

/// Granules in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) dirty: usize,
    pub(super) clean: usize,
    pub(super) warm: usize,
    pub(super) leased: usize,
    pub(super) lost: usize,
    pub(super) broken: usize,
    pub(super) leaving: usize,
    pub(super) shared: usize,
    pub(super) shared_lost: usize,
}

impl Counts {
    fn of(&mut self, slot: Slot) -> Option<&mut usize> {
        match slot {
            Slot::Absent => None,
            Slot::Dirty => Some(&mut self.dirty),
            Slot::Clean => Some(&mut self.clean),
            Slot::Warm => Some(&mut self.warm),
            Slot::Leased(_) => Some(&mut self.leased),
            Slot::Lost(_) => Some(&mut self.lost),
            Slot::Broken => Some(&mut self.broken),
            Slot::Leaving => Some(&mut self.leaving),
            Slot::Shared => Some(&mut self.shared),
            Slot::SharedLost => Some(&mut self.shared_lost),
        }
    }
}

/// An accepted extent and the granules that lie wholly inside it.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExtentSlots {
    pub(super) extent: Extent,
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) leased: usize,
    /// Other hosts have it too.
    pub(super) shared: bool,
}

impl ExtentSlots {
    pub(super) fn slots(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.count
    }
}

/// Why a client's message about its leases is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum LeaseError {
    /// Not whole granules.
    #[error("offset {offset:#x} length {len:#x} is not a multiple of the 2 MiB granule")]
    Misaligned {
        /// Offset into the window.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Not inside the window.
    #[error("offset {offset:#x} length {len:#x} lies outside the window")]
    Outside {
        /// Offset into the window.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Somebody else's, or nobody's.
    #[error("the granule at {offset:#x} is not leased to this client")]
    NotLeased {
        /// Offset into the window.
        offset: u64,
    },
}

/// What a change of the accepted extents meant for the table.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Synced {
    /// Bytes that came.
    pub(super) gained: u64,
    /// Leases whose memory is gone (forced release).
    pub(super) lost: Vec<(ClientId, WindowRange)>,
    /// Shared memory that is gone while somebody mapped it.
    pub(super) shared_lost: Vec<(ExtentTag, WindowRange)>,
}

impl Synced {
    /// Whether somebody has lost something.
    pub(super) fn has_lost(&self) -> bool {
        !(self.lost.is_empty() && self.shared_lost.is_empty())
    }

    /// What was meant by `earlier` is meant as well.
    pub(super) fn after(mut self, earlier: Self) -> Self {
        self.lost.extend(earlier.lost);
        self.shared_lost.extend(earlier.shared_lost);
        self
    }
}

/// The table.
#[derive(Debug)]
pub(super) struct LeaseTable {
    base: Dpa,
    pub(super) block: u64,
    pub(super) slots: Vec<Slot>,
    /// To be given to the device as soon as it is free; never leased again.
    pub(super) outgoing: Vec<bool>,
    /// Outgoing because the device wants it, for as long as that takes.
    pub(super) wanted: Vec<bool>,
    /// Made one huge page, and not wiped since in a way that undoes it.
    huge: Vec<bool>,
    pub(super) extents: Vec<ExtentSlots>,
    counts: Counts,
    /// Shared tags that are mapped, and by how many readers.
    pub(super) mapped: BTreeMap<ExtentTag, usize>,
    /// Where all of it is written down at once.
    pub(super) ledger: Ledger,
}

impl LeaseTable {
    /// A table for a window over `span`, as `ledger` has it and without
    /// extents. `block` is the device's block size in bytes, a power of two.
    pub(super) fn new(span: DpaRange, block: u64, ledger: Ledger) -> Self {
        let granules = (span.len / GRANULE) as usize;
        let mut table = Self {
            base: span.start,
            block,
            slots: vec![Slot::Absent; granules],
            outgoing: vec![false; granules],
            wanted: vec![false; granules],
            huge: vec![false; granules],
            extents: Vec::new(),
            counts: Counts::default(),
            mapped: BTreeMap::new(),
            ledger,
        };
        for index in 0..granules {
            let entry = table.ledger.slot(index);
            if entry.slot != Slot::Absent {
                table.outgoing[index] = entry.outgoing;
                table.wanted[index] = entry.outgoing;
                table.huge[index] = entry.huge;
                table.set(index, entry.slot);
            }
        }
        table
    }

    /// Takes over the list of accepted extents. New granules are dirty unless
    /// `zeroed` says that the device promises zeroes, and those of a tag shared
    /// if its extents are numbered or lie where `sharable` says so.
    pub(super) fn sync(
        &mut self,
        accepted: &[Extent],
        zeroed: impl Fn(&DpaRange) -> bool,
        sharable: impl Fn(&DpaRange) -> bool,
    ) -> Synced {
        let mut synced = Synced::default();
        let mut present = vec![Slot::Absent; self.slots.len()];
        let before = std::mem::take(&mut self.extents);
        let numbered = accepted.iter().filter(|e| e.shared_seq != 0);
        let numbered: BTreeSet<ExtentTag> = numbered.map(|e| e.tag).collect();
        for extent in accepted {
            let (first, count) = self.whole_granules(&extent.range);
            let shared = !extent.tag.is_null()
                && (numbered.contains(&extent.tag) || sharable(&extent.range));
            let fresh = if shared {
                Slot::Shared
            } else if zeroed(&extent.range) {
                Slot::Clean
            } else {
                Slot::Dirty
            };
            present[first..first + count].fill(fresh);
            self.extents.push(ExtentSlots {
                extent: *extent,
                first,
                count,
                leased: 0,
                shared,
            });
        }
        for (index, &fresh) in present.iter().enumerate() {
            match (self.slots[index], fresh) {
                (Slot::Absent, Slot::Absent) | (Slot::Lost(_) | Slot::SharedLost, _) => {}
                (Slot::Absent, fresh) => {
                    self.set(index, fresh);
                    synced.gained += GRANULE;
                }
                (Slot::Shared, Slot::Shared) => {}
                // Also what has become something else while nobody looked.
                (old, fresh)
                    if fresh == Slot::Absent
                        || (old == Slot::Shared) != (fresh == Slot::Shared) =>
                {
                    self.replace(index, fresh, &before, &mut synced);
                }
                _ => {}
            }
        }
        for extent in &mut self.extents {
            let slots = &self.slots[extent.first..extent.first + extent.count];
            extent.leased = slots
                .iter()
                .filter(|slot| matches!(slot, Slot::Leased(_)))
                .count();
        }
        synced
    }

    /// The device has taken `ranges`, even if it has offered them anew since:
    /// [`Self::sync`] says afterwards what is there now.
    pub(super) fn take(&mut self, ranges: &[DpaRange]) -> Synced {
        let mut synced = Synced::default();
        let before = std::mem::take(&mut self.extents);
        for index in 0..self.slots.len() {
            let gone = self.dpa(range_of(index, 1));
            let was = self.slots[index];
            let is_gone = matches!(was, Slot::Absent | Slot::Lost(_) | Slot::SharedLost);
            if !is_gone && ranges.iter().any(|range| range.intersects(&gone)) {
                self.replace(index, Slot::Absent, &before, &mut synced);
            }
        }
        self.extents = before;
        synced
    }

    /// What slot `index` was is gone, and there is `fresh` instead. Whoever had
    /// it has lost it. The extents were those of `before`.
    fn replace(&mut self, index: usize, fresh: Slot, before: &[ExtentSlots], synced: &mut Synced) {
        let old = self.slots[index];
        let gone = range_of(index, 1);
        self.outgoing[index] = false;
        self.wanted[index] = false;
        self.huge[index] = false;
        self.set(index, fresh);
        if old == Slot::Shared
            && let Some(tag) = self.mapped_there(before, index)
        {
            self.set(index, Slot::SharedLost);
            push_lost(&mut synced.shared_lost, tag, gone);
        }
        if let Slot::Leased(client) = old {
            self.set(index, Slot::Lost(client));
            push_lost(&mut synced.lost, client, gone);
        }
    }

    /// Leases up to `bytes` (rounded up to granules) of zeroed memory with this
    /// tag (none, if it is null) to `client`.
    pub(super) fn grant(
        &mut self,
        client: ClientId,
        bytes: u64,
        tag: ExtentTag,
    ) -> Vec<WindowRange> {
        let mut wanted = bytes.div_ceil(GRANULE);
        let mut granted = Vec::new();
        for extent in self.fullest_first_of(tag) {
            // Warm granules first: the client's first touch is then one fault, not 512.
            for kind in [Slot::Warm, Slot::Clean] {
                for index in self.extents[extent].slots() {
                    if wanted == 0 {
                        break;
                    }
                    if self.slots[index] == kind && !self.outgoing[index] {
                        self.set(index, Slot::Leased(client));
                        self.extents[extent].leased += 1;
                        push_merged(&mut granted, range_of(index, 1));
                        wanted -= 1;
                    }
                }
            }
        }
        granted
    }

    /// Takes back what `client` returns, lost or not; all of `range` or nothing.
    /// Returns the bytes that were leased.
    pub(super) fn give_back(
        &mut self,
        client: ClientId,
        range: WindowRange,
    ) -> Result<u64, LeaseError> {
        let slots = self.slots_of(range)?;
        let held = [Slot::Leased(client), Slot::Lost(client)];
        if let Some(other) = slots.clone().find(|i| !held.contains(&self.slots[*i])) {
            return Err(LeaseError::NotLeased {
                offset: range_of(other, 1).offset,
            });
        }
        Ok(slots.map(|index| self.release_slot(index)).sum())
    }

    /// Makes what `from` holds `to`'s, unless it is already; all of `ranges` or
    /// nothing.
    pub(super) fn hand_over(
        &mut self,
        from: ClientId,
        to: ClientId,
        ranges: &[WindowRange],
    ) -> bool {
        let ours = |range: &WindowRange| {
            let mut slots = self.slots_of(*range).unwrap_or(0..0);
            !slots.is_empty() && slots.all(|index| self.slots[index].is_held_by(&[from, to]))
        };
        if !ranges.iter().all(ours) {
            return false;
        }
        for index in ranges.iter().flat_map(|range| granules(*range)) {
            match self.slots[index] {
                Slot::Lost(_) => self.set(index, Slot::Lost(to)),
                _ => self.set(index, Slot::Leased(to)),
            }
        }
        true
    }

    /// Ends what `client` holds of `ranges`; returns the bytes of leases.
    pub(super) fn let_go(&mut self, client: ClientId, ranges: &[WindowRange]) -> u64 {
        let mut bytes = 0;
        for range in ranges {
            for index in self.slots_of(*range).unwrap_or(0..0) {
                if self.slots[index].is_held_by(&[client]) {
                    bytes += self.release_slot(index);
                }
            }
        }
        bytes
    }

    /// Bytes leased to families.
    pub(super) fn forked(&self) -> u64 {
        let shared = |slot: &&Slot| matches!(slot, Slot::Leased(client) if client.is_family());
        self.slots.iter().filter(shared).count() as u64 * GRANULE
    }

    /// Who holds anything.
    pub(super) fn holders(&self) -> BTreeSet<ClientId> {
        let holder = |slot: &Slot| match slot {
            Slot::Leased(client) | Slot::Lost(client) => Some(*client),
            _ => None,
        };
        self.slots.iter().filter_map(holder).collect()
    }

    /// What of `ranges` is asked back.
    pub(super) fn marked_within(&self, ranges: &[WindowRange]) -> Vec<WindowRange> {
        let mut marked = Vec::new();
        for index in ranges.iter().flat_map(|range| granules(*range)) {
            if self.outgoing[index] {
                push_merged(&mut marked, range_of(index, 1));
            }
        }
        marked
    }

    /// Whether all of `ranges` is leased to `client`.
    pub(super) fn is_leased_to(&self, client: ClientId, ranges: &[WindowRange]) -> bool {
        ranges.iter().all(|range| {
            let mut slots = self.slots_of(*range).unwrap_or(0..0);
            !slots.is_empty() && slots.all(|index| self.slots[index] == Slot::Leased(client))
        })
    }

    /// What of `ranges` `client` holds and the device has taken.
    pub(super) fn lost_within(&self, client: ClientId, ranges: &[WindowRange]) -> Vec<WindowRange> {
        let mut lost = Vec::new();
        for index in ranges.iter().flat_map(|range| granules(*range)) {
            if self.slots[index] == Slot::Lost(client) {
                push_merged(&mut lost, range_of(index, 1));
            }
        }
        lost
    }

    /// What `client` has leased, at most `bytes` of it.
    pub(super) fn leased_by(&self, client: ClientId, bytes: u64) -> Vec<WindowRange> {
        let leased = |index: &usize| self.slots[*index] == Slot::Leased(client);
        let mut ranges = Vec::new();
        let all = (0..self.slots.len()).filter(leased);
        for index in all.take(bytes.div_ceil(GRANULE) as usize) {
            push_merged(&mut ranges, range_of(index, 1));
        }
        ranges
    }

    /// Ends all leases of `client`; returns their bytes.
    pub(super) fn end(&mut self, client: ClientId) -> u64 {
        let mut bytes = 0;
        for index in 0..self.slots.len() {
            if [Slot::Leased(client), Slot::Lost(client)].contains(&self.slots[index]) {
                bytes += self.release_slot(index);
            }
        }
        bytes
    }

    /// The next run of free granules that must be wiped, in the order of
    /// grants, and whether they are huge pages.
    pub(super) fn next_dirty(&self) -> Option<(WindowRange, bool)> {
        if self.counts.dirty == 0 {
            return None;
        }
        let run = self.next_run(Slot::Dirty, |_| true)?;
        let slots = granules(run);
        let huge = self.huge[slots.start];
        let alike = slots.clone().take_while(|i| self.huge[*i] == huge).count();
        Some((range_of(slots.start, alike), huge))
    }

    /// The next zeroed granule that is not one huge page yet, if fewer than
    /// `reserve` granules are.
    pub(super) fn next_cold(&self, reserve: usize) -> Option<WindowRange> {
        if self.counts.clean == 0 || self.counts.warm >= reserve {
            return None;
        }
        let cold = self.next_run(Slot::Clean, |_| true);
        cold.map(|run| WindowRange {
            len: GRANULE,
            ..run
        })
    }

    fn next_run(&self, kind: Slot, of: impl Fn(&Extent) -> bool) -> Option<WindowRange> {
        let wanted = |index: usize| self.slots[index] == kind && !self.outgoing[index];
        let order = self.fullest_first();
        let mut order = order.into_iter().filter(|i| of(&self.extents[*i].extent));
        order.find_map(|extent| {
            let slots = self.extents[extent].slots();
            let first = slots.clone().find(|index| wanted(*index))?;
            let count = (first..slots.end)
                .take_while(|index| wanted(*index))
                .count();
            Some(range_of(first, count))
        })
    }

    /// Notes that `range` was wiped.
    pub(super) fn zeroed(&mut self, range: WindowRange) {
        for index in granules(range) {
            if self.slots[index] == Slot::Dirty {
                let kept = self.huge[index];
                self.set(index, if kept { Slot::Warm } else { Slot::Clean });
            }
        }
    }

    /// Notes that the granule at `offset`, which was free, can't be written.
    pub(super) fn broke(&mut self, offset: u64) {
        let index = (offset / GRANULE) as usize;
        if self.slots[index].is_free() {
            self.huge[index] = false;
            self.set(index, Slot::Broken);
        }
    }

    /// Notes that the granule at `offset` is one huge page. If somebody has
    /// leased it meanwhile, or has had it, that is of no use to the table.
    pub(super) fn warmed(&mut self, offset: u64) {
        let index = (offset / GRANULE) as usize;
        if self.slots[index] == Slot::Clean {
            self.huge[index] = true;
            self.set(index, Slot::Warm);
        }
    }

    /// Whether a request for this tag could get something now.
    pub(super) fn can_grant(&self, tag: ExtentTag) -> bool {
        let of = |extent: &Extent| extent.tag == tag;
        self.counts.warm + self.counts.clean > 0
            && (self.next_run(Slot::Warm, of).is_some() || self.next_run(Slot::Clean, of).is_some())
    }

    /// Whether something of this tag is being wiped.
    pub(super) fn is_wiping(&self, tag: ExtentTag) -> bool {
        self.counts.dirty > 0 && self.next_run(Slot::Dirty, |e| e.tag == tag).is_some()
    }

    /// Granules in each state.
    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// Where `range` lies in the device.
    pub(super) fn dpa(&self, range: WindowRange) -> DpaRange {
        DpaRange {
            start: Dpa(self.base.0.saturating_add(range.offset)),
            len: range.len,
        }
    }

    /// First granule and number of granules that lie wholly inside `range`.
    fn whole_granules(&self, range: &DpaRange) -> (usize, usize) {
        let offset = |dpa: Dpa| dpa.0.saturating_sub(self.base.0);
        let first = offset(range.start).div_ceil(GRANULE) as usize;
        let end = ((offset(range.end()) / GRANULE) as usize).min(self.slots.len());
        (first.min(end), end.saturating_sub(first))
    }

    fn fullest_first(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.extents.len()).collect();
        order.sort_by_key(|index| std::cmp::Reverse(self.extents[*index].leased));
        order
    }

    /// As [`Self::fullest_first`], those with this tag.
    fn fullest_first_of(&self, tag: ExtentTag) -> Vec<usize> {
        let mut order = self.fullest_first();
        order.retain(|index| self.extents[*index].extent.tag == tag);
        order
    }

    pub(super) fn set(&mut self, index: usize, slot: Slot) {
        let old = std::mem::replace(&mut self.slots[index], slot);
        if let Some(count) = self.counts.of(old) {
            *count -= 1;
        }
        if let Some(count) = self.counts.of(slot) {
            *count += 1;
        }
        self.write_down(index);
    }

    /// Writes down what slot `index` is, for a broker that comes after this one.
    pub(super) fn write_down(&mut self, index: usize) {
        let entry = SlotEntry {
            slot: self.slots[index],
            outgoing: self.wanted[index],
            huge: self.huge[index],
        };
        self.ledger.set_slot(index, entry);
    }

    /// Ends the leases of `client` but for those in `claimed`, which it says
    /// it has.
    ///
    /// # Errors
    /// It claims what it does not hold; nothing has changed.
    pub(super) fn settle_claims(
        &mut self,
        client: ClientId,
        claimed: &[WindowRange],
    ) -> Result<(), LeaseError> {
        let held = [Slot::Leased(client), Slot::Lost(client)];
        let mut keeps = vec![false; self.slots.len()];
        for range in claimed {
            for index in self.slots_of(*range)? {
                // What it has just shared it may not have struck out yet.
                if self.slots[index].is_held_by(&[client.family()]) {
                    continue;
                }
                if !held.contains(&self.slots[index]) {
                    let offset = range_of(index, 1).offset;
                    return Err(LeaseError::NotLeased { offset });
                }
                keeps[index] = true;
            }
        }
        for (index, keeps) in keeps.into_iter().enumerate() {
            if held.contains(&self.slots[index]) && !keeps {
                self.release_slot(index);
            }
        }
        Ok(())
    }

    /// What `client` holds: bytes that are leased, and ranges that are lost.
    pub(super) fn held(&self, client: ClientId) -> (u64, Vec<WindowRange>) {
        let (mut leased, mut lost) = (0, Vec::new());
        for (index, slot) in self.slots.iter().enumerate() {
            if *slot == Slot::Leased(client) {
                leased += GRANULE;
            } else if *slot == Slot::Lost(client) {
                push_merged(&mut lost, range_of(index, 1));
            }
        }
        (leased, lost)
    }

    /// The slots of a range that came from a client.
    fn slots_of(&self, range: WindowRange) -> Result<std::ops::Range<usize>, LeaseError> {
        let WindowRange { offset, len } = range;
        if !offset.is_multiple_of(GRANULE) || !len.is_multiple_of(GRANULE) || len == 0 {
            return Err(LeaseError::Misaligned { offset, len });
        }
        let end = offset
            .checked_add(len)
            .map(|end| (end / GRANULE) as usize)
            .filter(|end| *end <= self.slots.len());
        let end = end.ok_or(LeaseError::Outside { offset, len })?;
        Ok((offset / GRANULE) as usize..end)
    }

    /// Ends the lease of a slot; the bytes that were leased and not lost.
    fn release_slot(&mut self, index: usize) -> u64 {
        let was_leased = matches!(self.slots[index], Slot::Leased(_));
        let extent = self
            .extents
            .iter_mut()
            .find(|extent| extent.slots().contains(&index));
        let free = match &extent {
            None => Slot::Absent,
            // Offered anew under what was lost: other hosts have it, and it is not to be wiped.
            Some(extent) if extent.shared => Slot::Shared,
            Some(_) => Slot::Dirty,
        };
        if let Some(extent) = extent.filter(|_| was_leased) {
            extent.leased -= 1;
        }
        self.set(index, free);
        if was_leased { GRANULE } else { 0 }
    }
}

/// The slots of `range`.
pub(super) fn granules(range: WindowRange) -> std::ops::Range<usize> {
    (range.offset / GRANULE) as usize..(range.end() / GRANULE) as usize
}

/// `count` granules from slot `index`.
pub(super) fn range_of(index: usize, count: usize) -> WindowRange {
    WindowRange {
        offset: index as u64 * GRANULE,
        len: count as u64 * GRANULE,
    }
}

/// Appends `range`, joined with the last one if that ends where it starts.
pub(super) fn push_merged(ranges: &mut Vec<WindowRange>, range: WindowRange) {
    match ranges.last_mut() {
        Some(last) if last.end() == range.offset => last.len += range.len,
        _ => ranges.push(range),
    }
}

/// As [`push_merged`], for what each `of` has lost.
fn push_lost<T: PartialEq>(lost: &mut Vec<(T, WindowRange)>, of: T, range: WindowRange) {
    match lost.last_mut() {
        Some((same, last)) if *same == of && last.end() == range.offset => last.len += range.len,
        _ => lost.push((of, range)),
    }
}

#[cfg(test)]
mod tests;
