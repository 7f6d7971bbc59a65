//! Granules whose content is lost: the device took their extent by force, or
//! it is broken.

use core::sync::atomic::Ordering;

use super::granule::{Backing, GRANULE, Owner, PAGE};
use super::pool::wants;
use super::table::State;
use super::{Space, map};
use crate::source::{Ranges, WindowRange};

/// Granules that change under one hold of the lock.
const BATCH: usize = 16;

/// What a granule holds once its content is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fate {
    /// Zeroes.
    Zero,
    /// Nothing: who touches it gets SIGBUS, and system calls EFAULT.
    Fault,
}

impl Space {
    /// Takes granules in use off the extents in `gone`; `fate` says what
    /// becomes of an owner's, and is asked once for each. The extents that
    /// nothing maps any more; call again until there are none.
    ///
    /// A granule on the move meets its fate when it arrives.
    pub(crate) fn lose(&self, gone: &[WindowRange], mut fate: impl FnMut(Owner) -> Fate) -> Ranges {
        let mut state = self.state.lock();
        let mut off = Ranges::EMPTY;
        let mut left = BATCH;
        for index in 0..state.high {
            if left == 0 {
                break;
            }
            let granule = *state.granule(index);
            let here = matches!(granule.backing, Backing::Extent(at) if wants(gone, at));
            if !here || granule.is_idle() || granule.fate.is_some() {
                continue;
            }
            let fate = fate(granule.owner);
            self.lost.fetch_add(GRANULE as u64, Ordering::Relaxed);
            if granule.in_flight {
                state.granule_mut(index).fate = Some(fate);
            } else if let Some(offset) = state.lose_at(index, fate) {
                let len = GRANULE as u64;
                off.push(WindowRange { offset, len });
                left -= 1;
            }
        }
        off
    }

    /// Where in the window the extent behind an address lies.
    pub(crate) fn extent_at(&self, addr: usize) -> Option<WindowRange> {
        match self.backing_of(addr)? {
            Backing::Extent(offset) => Some(WindowRange {
                offset,
                len: GRANULE as u64,
            }),
            _ => None,
        }
    }

    /// Takes what is to become of the spilled granule at `addr`, whose content
    /// was lost on its way to the file.
    pub(crate) fn take_fate(&self, addr: usize) -> Option<Fate> {
        let mut state = self.state.lock();
        let index = state.index(addr)?;
        state.granule_mut(index).fate.take()
    }

    /// It has not met it yet.
    pub(crate) fn put_back_fate(&self, addr: usize, fate: Option<Fate>) {
        let mut state = self.state.lock();
        if let Some(index) = state.index(addr) {
            state.granule_mut(index).fate = fate;
        }
    }

    /// A granule of a shared mapping that raises SIGBUS when touched.
    pub(crate) fn dead(&self) -> usize {
        self.state.lock().dead
    }

    /// Bytes of granules whose content was lost to a device.
    pub(crate) fn lost_bytes(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl State {
    /// Puts zeroes, or what faults, behind a granule that is in use and not on
    /// the move. Its extent, which nothing maps any more.
    pub(super) fn lose_at(&mut self, index: usize, fate: Fate) -> Option<u64> {
        let (at, granule) = (self.addr(index), *self.granule(index));
        // SAFETY: a granule of this space, whose content is gone.
        let zeroed = fate == Fate::Zero && unsafe { map::back_with_dram(at, GRANULE) }.is_ok();
        // Should the kernel lack memory for one mapping, another may do;
        // without any, what was there stays, and its lender does not get it.
        // SAFETY: as above; `dead` is a granule of a shared mapping.
        let faults = !zeroed && unsafe { map::back_with_window(at, self.dead, GRANULE) }.is_ok();
        // SAFETY: as above.
        let off = zeroed || faults || unsafe { map::unback(at, GRANULE) }.is_ok();

        let live = u64::from(granule.live.count()) * PAGE as u64;
        let now = if zeroed { Backing::Dram } else { Backing::Lost };
        self.count_out(granule.backing, live);
        self.count_in(now, live);
        let entry = self.granule_mut(index);
        entry.backing = now;
        entry.in_flight = !zeroed;
        entry.dirty = entry.live;
        entry.refused = None;
        entry.fate = None;
        self.usage.note_peaks();
        self.set_gap(index);
        self.unneeded(granule.backing).filter(|_| off)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::Refusal;
    use crate::space::rebind::RUN;
    use crate::space::{Domain, Leaving, Tier};
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

    const WINDOW: usize = 8 * GRANULE;

    /// A space with some granules lent.
    fn space(lent: usize) -> Space {
        let space = Space::new();
        space.open().unwrap();
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let window =
            unsafe { mmap_anonymous(core::ptr::null_mut(), WINDOW, prot, MapFlags::SHARED) };
        // SAFETY: it stays, and is this space's alone.
        unsafe { space.open_window(window.unwrap() as usize, WINDOW) }.unwrap();
        let mut ranges = Ranges::EMPTY;
        ranges.push(WindowRange {
            offset: 0,
            len: (lent * GRANULE) as u64,
        });
        space.lend(&ranges);
        space
    }

    fn fill(space: &Space) -> usize {
        let domain: Domain = Tier::Extent.into();
        let run = space.alloc(domain, GRANULE, GRANULE, false).unwrap();
        // SAFETY: a new granule.
        unsafe { (run.addr as *mut u8).write_bytes(7, GRANULE) };
        run.addr
    }

    fn first_byte(addr: usize) -> u8 {
        // SAFETY: a live granule of a test.
        unsafe { (addr as *const u8).read_volatile() }
    }

    fn leaving(wanted: &[WindowRange], to_extents: bool, dram: u64) -> Leaving<'_> {
        Leaving {
            wanted,
            granules: 1,
            to_extents,
            dram,
            spill: u64::MAX,
        }
    }

    /// The extent of a granule on the move was lost: wherever it arrives, it is
    /// not taken for whole.
    #[test]
    fn what_is_on_the_move_is_lost_when_it_arrives() {
        // To another extent, to DRAM, nowhere.
        for (to_extents, dram, stayed) in [
            (true, 0, None),
            (false, u64::MAX, None),
            (false, u64::MAX, Some(Refusal::CannotMove)),
        ] {
            let space = space(2);
            let at = fill(&space);
            let gone = [space.extent_at(at).unwrap()];
            let picked = space.pick_leaving(leaving(&gone, to_extents, dram));
            let mut asked = 0;
            let off = space.lose(&gone, |_| {
                asked += 1;
                Fate::Zero
            });
            assert!(off.is_empty() && asked == 1, "it is mapped still");
            assert_eq!(first_byte(at), 7);
            assert!(space.lose(&gone, |_| unreachable!("told twice")).is_empty());
            let mut all = [None; RUN];
            all[0] = stayed;
            let ended = space.end_move(picked.unwrap(), &all);
            assert_eq!(first_byte(at), 0, "{to_extents} {dram} {stayed:?}");
            assert_eq!(space.backing_of(at), Some(Backing::Dram));
            // Both that it left and that it was meant for.
            let extents = if to_extents { 2 } else { 1 };
            assert_eq!(ended.freed.bytes(), (extents * GRANULE) as u64);
            let usage = space.usage();
            assert_eq!((usage.extent_live, usage.dram_live), (0, GRANULE as u64));
            assert_eq!(usage.extent_held, ((2 - extents) * GRANULE) as u64);
            assert_eq!(space.lost_bytes(), GRANULE as u64);
        }
    }

    /// In the file it stays lost, until it comes back.
    #[test]
    fn what_is_on_its_way_to_the_file_is_lost_there() {
        let space = space(1);
        let at = fill(&space);
        let gone = [space.extent_at(at).unwrap()];
        let picked = space.pick_leaving(leaving(&gone, false, 0)).unwrap();
        assert!(picked.is_spill());
        space.lose(&gone, |_| Fate::Fault);
        space.end_move(picked, &[None; RUN]);
        assert_eq!(space.take_fate(at), Some(Fate::Fault));
        assert_eq!(space.take_fate(at), None);
    }

    /// Where nothing is live any more, nothing is lost.
    #[test]
    fn what_was_freed_on_the_move_is_forgotten() {
        let space = space(1);
        let at = fill(&space);
        let gone = [space.extent_at(at).unwrap()];
        let picked = space.pick_leaving(leaving(&gone, false, u64::MAX)).unwrap();
        space.lose(&gone, |_| Fate::Fault);
        space.free(at, GRANULE);
        let mut stayed = [None; RUN];
        stayed[0] = Some(Refusal::CannotMove);
        let ended = space.end_move(picked, &stayed);
        assert!(ended.freed.is_empty());
        let idle = space.take_idle(usize::MAX, &gone, 0);
        assert_eq!(idle.as_slice(), gone);
        assert_eq!(space.usage().extent_held, 0);
    }

    #[test]
    fn lost_without_a_callback_is_marked_and_takes_nothing_in() {
        let space = space(1);
        let at = fill(&space);
        space.free(at + GRANULE / 2, GRANULE / 2);
        let gone = [space.extent_at(at).unwrap()];
        let off = space.lose(&gone, |owner| {
            assert_eq!(owner, Owner::HEAP);
            Fate::Fault
        });
        assert_eq!(off.as_slice(), gone);
        assert!(space.is_lost(at) && space.owner_of(at) == Some(Owner::HEAP));
        let domain: Domain = Tier::Extent.into();
        let half = at + GRANULE / 2;
        assert!(space.alloc_in_use(domain, PAGE, PAGE).is_none());
        assert!(space.alloc_at(domain, half, PAGE).is_none());
        space.free(at, GRANULE / 2);
        assert_eq!(space.usage().extent_live, 0);
    }
}
