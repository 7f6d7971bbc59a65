//! The granule table and the search for free pages in it.

use core::sync::atomic::{AtomicU16, Ordering};

use super::granule::{
    Backing, Domain, GRANULE, Granule, Owner, PAGE, PAGES_PER_GRANULE, SHELVES, Tier,
};
use super::lots::{LOTS, Lot, Lots};
use super::pool::Pool;
use super::{Run, Usage};

/// In an entry of the table of owners: what is there is lost.
pub(super) const LOST: u16 = 1 << 15;
/// Free runs of 1, 2, 4 … 512 pages have a hint each.
const HINTS: usize = 10;

/// So many granules with room are looked into for a tight place.
const LOOKED_AT: usize = 16;

/// The reserve in granules is never larger: what is on its way comes in time.
const RESERVE_MAX: usize = 32;

pub(super) struct State {
    base: usize,
    /// Entries of the table.
    pub(super) granules: usize,
    table: *mut Granule,
    /// Longest free run of each granule, by shelf; 0: none, or another shelf's.
    /// Apart from the table, so that a search reads 2 bytes a granule.
    gaps: [*mut u16; SHELVES],
    /// No granule below `hint[shelf][k]` has a free run of 2^k pages or more.
    hint: [[usize; HINTS]; SHELVES],
    /// Whose each granule is, for readers without the lock.
    owners: *const AtomicU16,
    /// Granules at and above this one were never used.
    pub(super) high: usize,
    pub(super) window: usize,
    pub(super) window_len: usize,
    /// A granule of a shared mapping that faults; 0: none yet.
    pub(super) dead: usize,
    /// Granules that are leased and not mapped, by lot.
    pub(super) pools: [Pool; LOTS],
    pub(super) lots: Lots,
    pub(super) usage: Usage,
    /// Every `dram_every`-th new granule of the extent tier is DRAM by choice
    /// (placement `interleave`); 0: none.
    pub(super) dram_every: u32,
    pub(super) interleaved: u32,
    /// A fork is near: extents take nothing in.
    pub(super) extents_closed: bool,
    /// Pages of spilled granules were freed, and are in the file still.
    pub(super) spilled_freed: bool,
    pub(super) tick: u32,
    /// The tick at which granules were last lent: the age of the pool.
    pub(super) lent_at: u32,
}

// SAFETY: the tables belong to one space, which reaches them under its lock.
unsafe impl Send for State {}

/// Where a run may lie.
#[derive(Clone, Copy)]
struct Place {
    /// The granule that it begins in …
    first: usize,
    /// … and the page of it.
    start: usize,
    /// Granules of it that have no backing yet.
    new: usize,
}

impl State {
    pub(super) const NEW: Self = Self {
        base: 0,
        granules: 0,
        table: core::ptr::null_mut(),
        gaps: [core::ptr::null_mut(); SHELVES],
        hint: [[0; HINTS]; SHELVES],
        owners: core::ptr::null(),
        high: 0,
        window: 0,
        window_len: 0,
        dead: 0,
        pools: [Pool::NEW; LOTS],
        lots: Lots::NEW,
        usage: Usage::NEW,
        dram_every: 0,
        interleaved: 0,
        extents_closed: false,
        spilled_freed: false,
        tick: 0,
        lent_at: 0,
    };

    /// Bytes of table for `granules`.
    pub(super) const fn table_bytes(granules: usize) -> usize {
        granules * (size_of::<Granule>() + (SHELVES + 1) * size_of::<u16>())
    }

    /// # Safety
    /// `base` is the start of a reservation of that many granules, `table`
    /// zeroed memory of [`State::table_bytes`]; both stay for ever and belong
    /// to nobody else.
    pub(super) unsafe fn open(&mut self, base: usize, granules: usize, table: usize) {
        let gaps = table + granules * size_of::<Granule>();
        self.base = base;
        self.granules = granules;
        self.table = table as *mut Granule;
        let array = |n: usize| gaps + n * granules * size_of::<u16>();
        self.gaps = core::array::from_fn(|shelf| array(shelf) as *mut u16);
        self.owners = array(SHELVES) as *const AtomicU16;
    }

    /// Where the owners are, one entry a granule, for readers without the
    /// lock; and where the first granule is.
    pub(super) fn owners(&self) -> (*const AtomicU16, usize) {
        (self.owners, self.base)
    }

    /// Whether an address lies in the reservation.
    pub(super) fn spans(&self, addr: usize) -> bool {
        addr.checked_sub(self.base)
            .is_some_and(|at| at < self.granules * GRANULE)
    }

    pub(super) fn addr(&self, index: usize) -> usize {
        self.base + index * GRANULE
    }

    /// The used granule that an address lies in.
    pub(super) fn index(&self, addr: usize) -> Option<usize> {
        let index = addr.checked_sub(self.base)? / GRANULE;
        (index < self.high).then_some(index)
    }

    pub(super) fn granule(&self, index: usize) -> &Granule {
        assert!(index < self.high);
        // SAFETY: below `high`, which is at most `granules`, and written when
        // `high` rose over it.
        unsafe { &*self.table.add(index) }
    }

    pub(super) fn granule_mut(&mut self, index: usize) -> &mut Granule {
        assert!(index < self.high);
        // SAFETY: as in `granule`, and `self` is borrowed exclusively.
        unsafe { &mut *self.table.add(index) }
    }

    fn gaps(&self, domain: Domain) -> &[u16] {
        if self.high == 0 {
            return &[];
        }
        // SAFETY: the array has `granules` zeroed entries, at least `high`.
        unsafe { core::slice::from_raw_parts(self.gaps[domain.shelf()], self.high) }
    }

    /// Whether a granule takes nothing in because a fork is near: what is on
    /// an extent then is not the child's.
    pub(super) fn is_closed(&self, index: usize) -> bool {
        self.extents_closed && matches!(self.granule(index).backing, Backing::Extent(_))
    }

    /// Brings the index of free runs up to date with a granule.
    pub(super) fn set_gap(&mut self, index: usize) {
        let granule = *self.granule(index);
        let gap = granule.gap();
        let right = granule.domain().shelf();
        for (shelf, gaps) in self.gaps.iter().enumerate() {
            let gap = if shelf == right { gap } else { 0 };
            // SAFETY: `granule` checked the index.
            unsafe { *gaps.add(index) = gap as u16 };
        }
        let owner = match granule.backing {
            Backing::None => 0,
            Backing::Lost => granule.owner.to_entry() | LOST,
            _ => granule.owner.to_entry(),
        };
        // SAFETY: as above.
        unsafe { (*self.owners.add(index)).store(owner, Ordering::Relaxed) };
        if gap > 0 {
            for hint in &mut self.hint[right][..=gap.ilog2() as usize] {
                *hint = (*hint).min(index);
            }
        }
    }

    /// A run inside one granule that is backed already: the tightest place in
    /// the lowest granules that have room. The lowest, so that few granules
    /// are full and the others run empty; the tightest, because where short
    /// runs are cut from any gap, soon none is left for runs of 7 pages. An even
    /// gap before an odd one, short and long runs from opposite ends: no
    /// better.
    pub(super) fn alloc_within(
        &mut self,
        domain: Domain,
        pages: usize,
        align: usize,
    ) -> Option<Run> {
        let class = pages.ilog2() as usize;
        let shelf = domain.shelf();
        let mut index = self.hint[shelf][class];
        let (mut hint, mut looked) = (None, 0);
        let mut best: Option<(usize, usize, usize)> = None;
        while looked < LOOKED_AT && best.is_none_or(|(gap, ..)| gap > pages) {
            let gaps = &self.gaps(domain)[index.min(self.high)..];
            let Some(step) = gaps.iter().position(|gap| usize::from(*gap) >= 1 << class) else {
                hint.get_or_insert(self.high);
                break;
            };
            index += step;
            hint.get_or_insert(index);
            if self.granule(index).domain() == domain
                && !self.is_closed(index)
                && let Some((start, gap)) = self.granule(index).live.tightest_gap(pages, align)
            {
                looked += 1;
                if best.is_none_or(|(shortest, ..)| gap < shortest) {
                    best = Some((gap, index, start));
                }
            }
            index += 1;
        }
        if let Some(hint) = hint {
            self.hint[shelf][class] = hint;
        }
        let (_, index, start) = best?;
        let zeroed = self.take_pages(index, start, pages);
        Some(Run {
            addr: self.addr(index) + start * PAGE,
            zeroed,
        })
    }

    /// A run that reaches over the ends of granules, or needs a new one: its
    /// first and last may be partly in use, those between have nothing live.
    pub(super) fn alloc_across(
        &mut self,
        domain: Domain,
        pages: usize,
        align: usize,
        dram_allowed: bool,
    ) -> Option<Run> {
        let place = if align <= 1 {
            self.find_place(domain, pages)?
        } else {
            let count = pages.div_ceil(PAGES_PER_GRANULE);
            let granules = align.div_ceil(PAGES_PER_GRANULE).max(1);
            self.find_empty(domain, count, granules)?
        };
        let (first, start, new) = (place.first, place.start, place.new);
        let end = first + (start + pages).div_ceil(PAGES_PER_GRANULE);
        let lent = self.idle_of(self.lot(domain.owner))
            - (first..end.min(self.high))
                .filter(|&i| self.granule(i).is_idle())
                .count();
        if domain.tier == Tier::Extent
            && !dram_allowed
            && new > lent + self.interleave_share(domain, new)
        {
            return None;
        }
        while self.high < end {
            // SAFETY: a place is found within `granules`.
            unsafe { *self.table.add(self.high) = Granule::NEW };
            self.high += 1;
        }
        if !self.back_run(first..end, domain, dram_allowed) {
            return None;
        }
        Some(self.take_run(place, pages))
    }

    /// Books a run whose granules are all backed.
    fn take_run(&mut self, place: Place, pages: usize) -> Run {
        let (mut zeroed, mut left, mut from) = (true, pages, place.start);
        let mut index = place.first;
        while left > 0 {
            let pages = left.min(PAGES_PER_GRANULE - from);
            zeroed &= self.take_pages(index, from, pages);
            left -= pages;
            from = 0;
            index += 1;
        }
        Run {
            addr: self.addr(place.first) + place.start * PAGE,
            zeroed,
        }
    }

    /// Where a run may begin that reaches over the end of a granule: of all
    /// places the lowest that needs the fewest new granules.
    fn find_place(&self, domain: Domain, pages: usize) -> Option<Place> {
        let mut best: Option<Place> = None;
        for first in 0..(self.high + 1).min(self.granules) {
            let free = self.free_end(domain, first);
            if free == 0 {
                continue;
            }
            let Some(new) = self.new_for(domain, first, free, pages) else {
                continue;
            };
            if best.is_none_or(|best| new < best.new) {
                let start = PAGES_PER_GRANULE - free;
                best = Some(Place { first, start, new });
            }
            if new == 0 {
                break;
            }
        }
        best
    }

    /// How many granules must be backed for a run that begins with the `free`
    /// last pages of `first`. `None`: something is in its way.
    fn new_for(&self, domain: Domain, first: usize, free: usize, pages: usize) -> Option<usize> {
        let mut new = usize::from(self.is_bare(first));
        let mut left = pages.saturating_sub(free);
        let mut index = first + 1;
        while left > 0 {
            if index >= self.granules
                || self.free_start(domain, index) < left.min(PAGES_PER_GRANULE)
            {
                return None;
            }
            new += usize::from(self.is_bare(index));
            left = left.saturating_sub(PAGES_PER_GRANULE);
            index += 1;
        }
        Some(new)
    }

    fn is_bare(&self, index: usize) -> bool {
        index >= self.high || self.granule(index).backing == Backing::None
    }

    /// How many pages at the end of a granule a run of this domain may take.
    fn free_end(&self, domain: Domain, index: usize) -> usize {
        match self.is_empty(domain, index) {
            true => PAGES_PER_GRANULE,
            false if self.is_shared(domain, index) => self.granule(index).live.free_end(),
            false => 0,
        }
    }

    /// How many pages at the start of a granule a run of this domain may take.
    fn free_start(&self, domain: Domain, index: usize) -> usize {
        match self.is_empty(domain, index) {
            true => PAGES_PER_GRANULE,
            false if self.is_shared(domain, index) => self.granule(index).live.free_start(),
            false => 0,
        }
    }

    /// Whether a granule that is partly in use takes a part of a longer run.
    /// What asks for extents does not lie half on a stopgap in DRAM.
    fn is_shared(&self, domain: Domain, index: usize) -> bool {
        self.gaps(domain)[index] > 0
            && self.granule(index).domain() == domain
            && !self.is_closed(index)
            && (domain.tier == Tier::Dram
                || matches!(self.granule(index).backing, Backing::Extent(_)))
    }

    /// Whether a granule may serve a domain and nothing of it is in use.
    fn is_empty(&self, domain: Domain, index: usize) -> bool {
        index >= self.high || {
            let granule = self.granule(index);
            let empty = granule.domain() == domain && !granule.in_flight && granule.live.is_empty();
            granule.backing == Backing::None || (empty && !self.is_closed(index))
        }
    }

    /// Of `new` granules, how many at least the interleaving makes DRAM.
    fn interleave_share(&self, domain: Domain, new: usize) -> usize {
        let every = match domain.owner {
            Owner::HEAP => self.dram_every as usize,
            _ => 0,
        };
        new.checked_div(every).unwrap_or(0)
    }

    /// The lowest run of `count` granules with nothing live, of which the
    /// first has an index whose address is a multiple of `align` granules.
    fn find_empty(&self, domain: Domain, count: usize, align: usize) -> Option<Place> {
        let step = |index: usize| {
            let place = self.base / GRANULE + index;
            place.next_multiple_of(align) - self.base / GRANULE
        };
        let mut first = step(0);
        while first.checked_add(count)? <= self.granules {
            match (first..first + count)
                .rev()
                .find(|&index| !self.is_empty(domain, index))
            {
                None => {
                    let new = (first..first + count).filter(|&i| self.is_bare(i)).count();
                    return Some(Place {
                        first,
                        start: 0,
                        new,
                    });
                }
                Some(taken) => first = step(taken + 1),
            }
        }
        None
    }

    /// How many granules should be unused, so that the hooks of a large heap
    /// find one without waiting: one to 32 in use. A small heap waits, because
    /// there one granule is a large part of it.
    fn reserve(&self) -> usize {
        let used = (self.usage.extent_held - self.usage.idle) as usize / GRANULE;
        (used / 32).min(RESERVE_MAX)
    }

    /// How many unused granules are missing from the reserve.
    pub(super) fn short_of(&self) -> usize {
        self.reserve().saturating_sub(self.idle_of(Lot::UNTAGGED))
    }

    /// How many unused granules of a lot there are beyond the reserve, which
    /// is of those without a tag.
    pub(super) fn surplus_of(&self, lot: Lot) -> usize {
        let reserve = match lot {
            Lot::UNTAGGED => self.reserve(),
            _ => 0,
        };
        self.idle_of(lot).saturating_sub(reserve)
    }

    /// Books pages of a backed granule as live; whether all of them are zero.
    pub(super) fn take_pages(&mut self, index: usize, start: usize, pages: usize) -> bool {
        let granule = self.granule_mut(index);
        let was_idle = granule.is_idle();
        let zeroed = !granule.dirty.intersects(start, pages);
        granule.live.insert(start, pages);
        granule.dirty.insert(start, pages);
        let backing = granule.backing;
        let bytes = (pages * PAGE) as u64;
        match backing {
            Backing::Extent(_) | Backing::Original(_) => self.usage.extent_live += bytes,
            Backing::Inherited(_) => self.usage.inherited += bytes,
            _ => self.usage.dram_live += bytes,
        }
        if was_idle {
            self.usage.idle -= GRANULE as u64;
        }
        self.usage.note_peaks();
        self.set_gap(index);
        zeroed
    }
}
