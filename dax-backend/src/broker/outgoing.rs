//! The part of the lease table that decides what goes back to the device.
//!
//! A granule marked *outgoing* is never leased again; as soon as it is free it
//! can be released. Untagged capacity goes back in multiples of the device's
//! block, capacity of one tag only whole (CXL r3.1 8.2.9.9.9; a partial release
//! of a tag group is refused by the device).
#![forbid(unsafe_code)]

use super::lease::{ClientId, ExtentSlots, LeaseTable, Slot, granules, push_merged, range_of};
use super::protocol::{GRANULE, WindowRange};
use crate::address::DpaRange;
use crate::extent::ExtentTag;

impl LeaseTable {
    /// Marks up to `bytes` of *free* capacity outgoing, from the emptiest
    /// extents first and from their ends, where grants come last. Returns the
    /// bytes marked.
    pub(super) fn mark_free(&mut self, bytes: u64) -> u64 {
        let unit = self.unit();
        let mut marked = 0;
        let mut order: Vec<usize> = (0..self.extents.len()).collect();
        order.sort_by_key(|index| self.extents[*index].leased);
        for index in order {
            let extent = self.extents[index];
            if extent.extent.tag.is_null() {
                for first in self.units(index).rev() {
                    if marked >= bytes {
                        return marked;
                    }
                    if (first..first + unit).all(|i| self.is_available(i)) {
                        self.outgoing[first..first + unit].fill(true);
                        marked += unit as u64 * GRANULE;
                    }
                }
            } else {
                let group = self.group(extent.extent.tag);
                let size = group.len() as u64 * GRANULE;
                let fits = size > 0 && size <= bytes.saturating_sub(marked);
                if fits && group.iter().all(|i| self.is_available(*i)) {
                    group.iter().for_each(|i| self.outgoing[*i] = true);
                    marked += size;
                }
            }
        }
        marked
    }

    /// Marks every granule that `range` touches outgoing, leased or not; with
    /// tagged capacity the whole tag; `wanted` by the device, or just now.
    /// Returns what is marked now and was not before.
    pub(super) fn mark_range(&mut self, range: &DpaRange, wanted: bool) -> Vec<WindowRange> {
        let mut touched = Vec::new();
        for extent in &self.extents {
            if !extent.extent.range.intersects(range) {
                continue;
            }
            if extent.extent.tag.is_null() {
                let hit = |i: &usize| self.dpa(range_of(*i, 1)).intersects(range);
                touched.extend(extent.slots().filter(hit));
            } else {
                touched.extend(self.group(extent.extent.tag));
            }
        }
        let mut marked = Vec::new();
        for index in touched {
            if wanted && !std::mem::replace(&mut self.wanted[index], true) {
                self.write_down(index);
            }
            if !std::mem::replace(&mut self.outgoing[index], true) {
                push_merged(&mut marked, range_of(index, 1));
            }
        }
        marked
    }

    /// Gives up on what is marked in `ranges`: it may be leased again.
    pub(super) fn unmark(&mut self, ranges: &[WindowRange]) {
        for index in ranges.iter().flat_map(|range| granules(*range)) {
            self.outgoing[index] = false;
            if std::mem::take(&mut self.wanted[index]) {
                self.write_down(index);
            }
        }
    }

    /// The device is asked to take `ranges`, all of it free or broken. What is
    /// shared stays that, so that no broker after this one wipes it.
    pub(super) fn leave(&mut self, ranges: &[WindowRange]) {
        for index in ranges.iter().flat_map(|range| granules(*range)) {
            if self.slots[index] != Slot::Shared {
                self.set(index, Slot::Leaving);
            }
        }
    }

    /// As [`Self::leave`], what of `ranges` is free.
    pub(super) fn leave_free(&mut self, ranges: &[WindowRange]) {
        for index in ranges.iter().flat_map(|range| granules(*range)) {
            if self.slots[index].is_free() {
                self.set(index, Slot::Leaving);
            }
        }
    }

    /// The device did not take `ranges`: they may be leased again, but for what
    /// it asked for, which stays marked.
    pub(super) fn stay(&mut self, ranges: &[WindowRange]) {
        for index in ranges.iter().flat_map(|range| granules(*range)) {
            if self.slots[index] == Slot::Leaving {
                self.set(index, Slot::Dirty);
            }
            self.outgoing[index] = self.wanted[index];
        }
    }

    /// Bytes that are free for anybody, wiped or not, and not marked.
    pub(super) fn available_bytes(&self) -> u64 {
        let untagged = self.extents.iter().filter(|e| e.extent.tag.is_null());
        let all = untagged.flat_map(|extent| extent.slots());
        all.filter(|index| self.is_available(*index)).count() as u64 * GRANULE
    }

    /// Bytes that are marked.
    pub(super) fn marked_bytes(&self) -> u64 {
        self.outgoing.iter().filter(|marked| **marked).count() as u64 * GRANULE
    }

    /// Marked granules still leased, and to whom.
    pub(super) fn marked_leases(&self) -> Vec<(ClientId, WindowRange)> {
        let mut leases: Vec<(ClientId, WindowRange)> = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let Slot::Leased(client) = *slot else {
                continue;
            };
            if !self.outgoing[index] {
                continue;
            }
            let range = range_of(index, 1);
            match leases.last_mut() {
                Some((id, last)) if *id == client && last.end() == range.offset => {
                    last.len += GRANULE;
                }
                _ => leases.push((client, range)),
            }
        }
        leases
    }

    /// What can be released now: marked, free or broken, in whole blocks or whole tags.
    /// An extent that goes entirely takes along its ends outside any granule.
    pub(super) fn releasable(&self) -> Vec<(DpaRange, Vec<WindowRange>)> {
        let unit = self.unit();
        let mut out = Vec::new();
        for (index, extent) in self.extents.iter().enumerate() {
            let mapped = self.mapped.contains_key(&extent.extent.tag);
            let ready = |i: usize| {
                let slot = self.slots[i];
                let free = slot.is_free() || slot == Slot::Broken;
                self.outgoing[i] && (free || slot == Slot::Shared && !mapped)
            };
            let whole = extent.count > 0 && extent.slots().all(ready);
            let tag = extent.extent.tag;
            if !tag.is_null() && !self.group(tag).iter().all(|i| ready(*i)) {
                continue;
            }
            if whole {
                let slots = vec![range_of(extent.first, extent.count)];
                out.push((extent.extent.range, slots));
                continue;
            }
            let mut runs = Vec::new();
            for first in self.units(index) {
                if (first..first + unit).all(ready) {
                    push_merged(&mut runs, range_of(first, unit));
                }
            }
            out.extend(runs.into_iter().map(|run| (self.dpa(run), vec![run])));
        }
        out
    }

    /// Parts of `range` that are accepted but lie in no granule, and so can't
    /// be leased: they can go back at once.
    pub(super) fn stranded(&self, range: &DpaRange) -> Vec<DpaRange> {
        let mut stranded = Vec::new();
        for extent in self.extents.iter().filter(|e| e.extent.tag.is_null()) {
            let slots = self.dpa(range_of(extent.first, extent.count));
            let ends = extent.extent.range.subtract(&slots).into_iter().flatten();
            stranded.extend(ends.filter_map(|end| end.intersection(range)));
        }
        stranded
    }

    /// Bytes of `range` that are accepted.
    pub(super) fn accepted_in(&self, range: &DpaRange) -> u64 {
        let overlap = |e: &ExtentSlots| e.extent.range.intersection(range);
        self.extents.iter().filter_map(overlap).map(|r| r.len).sum()
    }

    /// What of `range` is free, or with the device, and whether it is tagged.
    pub(super) fn free_in(&self, range: &DpaRange) -> Vec<(DpaRange, bool)> {
        let mut free = Vec::new();
        for extent in &self.extents {
            let mut runs = Vec::new();
            let idle = |i: &usize| self.slots[*i].is_free() || self.slots[*i] == Slot::Leaving;
            for index in extent.slots().filter(idle) {
                push_merged(&mut runs, range_of(index, 1));
            }
            let parts = runs
                .into_iter()
                .map(|run| self.dpa(run).intersection(range));
            let tagged = !extent.extent.tag.is_null();
            free.extend(parts.flatten().map(|part| (part, tagged)));
        }
        free
    }

    fn is_available(&self, index: usize) -> bool {
        self.slots[index].is_free() && !self.outgoing[index]
    }

    /// Granules per device block, at least one.
    fn unit(&self) -> usize {
        (self.block / GRANULE).max(1) as usize
    }

    /// First granules of the whole blocks inside extent `index`.
    fn units(&self, index: usize) -> impl DoubleEndedIterator<Item = usize> + use<> {
        let extent = self.extents[index];
        let unit = self.unit();
        let block = self.block.max(GRANULE);
        let start = self.dpa(range_of(extent.first, 0)).start.0;
        // Blocks are aligned in DPA; DC regions start at multiples of 256 MiB.
        let skip = (start.next_multiple_of(block) - start) / GRANULE;
        let first = extent.first + skip as usize;
        let count = extent.slots().end.saturating_sub(first) / unit;
        (0..count).map(move |i| first + i * unit)
    }

    fn group(&self, tag: ExtentTag) -> Vec<usize> {
        let of_tag = self.extents.iter().filter(|e| e.extent.tag == tag);
        of_tag.flat_map(|extent| extent.slots()).collect()
    }
}
