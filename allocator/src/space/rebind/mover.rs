//! The thread that moves granules.

use super::copy::copy_live;
use super::error::{RebindError, StartError};
use super::mapping::Mappings;
use super::monitor::{Monitor, now};
use super::placeholder;
use super::reserve::Reserve;
use super::spare::Spare;
use super::staging::{Staging, advise, populate_live};
use super::stall::StallHistogram;
use super::taken::Taken;
use super::transfers::Transfers;
use super::uffd::Uffd;
use super::{GRANULE, Memory, Moved, PAGE, RUN, Step};
use core::marker::PhantomData;
use core::mem::ManuallyDrop;
use core::ops::Range;
use rustix::fd::BorrowedFd;
use rustix::io::Errno;
use rustix::mm::Advice;

/// Moves granules. Stays on the thread that started it, which has the
/// descriptor table that the userfaultfd is in.
pub struct Mover {
    monitor: &'static Monitor,
    /// Never closed: that would turn placeholders into zeroes.
    uffd: ManuallyDrop<Uffd>,
    mappings: Mappings,
    transfers: Transfers,
    /// There whenever a granule is taken.
    reserve: Option<Reserve>,
    /// How many granules are taken.
    away: usize,
    guarded: bool,
    this_thread: PhantomData<*const ()>,
}

impl Mover {
    /// Opens a userfaultfd (see [`Uffd::open`] for `device`) and starts the
    /// monitor thread. Once per `monitor`; a forked child, which has no
    /// monitor thread, may do so again.
    ///
    /// pthread_create(3) allocates a little for the new thread; bind the
    /// calling thread to memory that never moves first.
    pub fn start(
        monitor: &'static Monitor,
        device: Option<BorrowedFd<'_>>,
    ) -> Result<Self, StartError> {
        let uffd = Uffd::open(device)?;
        let mappings = Mappings::open().map_err(StartError::NoProc)?;
        let transfers = Transfers::open().map_err(StartError::NoProc)?;
        monitor.start(&uffd).map_err(StartError::Monitor)?;
        Ok(Self {
            monitor,
            uffd: ManuallyDrop::new(uffd),
            mappings,
            transfers,
            reserve: None,
            away: 0,
            guarded: true,
            this_thread: PhantomData,
        })
    }

    /// See [`Uffd::takes_kernel_faults`]. If false, a system call of the
    /// program that meets a granule in flight fails with `EFAULT`.
    pub fn takes_kernel_faults(&self) -> bool {
        self.uffd.takes_kernel_faults()
    }

    /// Readable when threads began to wait; then ask [`wanted`](Self::wanted).
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.monitor.bell()
    }

    /// All waits so far.
    pub fn stalls(&self) -> StallHistogram {
        self.monitor.stalls.snapshot()
    }

    /// The granule in the range that a thread has waited for longest. It is
    /// one of those taken, or one given so shortly ago that the monitor heard
    /// of the wait after its end: then [`dismiss`](Self::dismiss) it. Ask
    /// until there is none.
    pub fn wanted(&self, range: Range<usize>) -> Option<usize> {
        let _ = rustix::io::read(self.bell(), &mut [0u8; 8]);
        if self.monitor.waiters.take_overflow() {
            // Who must still wait will be heard again.
            let _ = self.uffd.wake(range.start, range.len());
        }
        self.monitor.waiters.longest(range)
    }

    /// Forgets the waits on a granule that is not taken.
    pub fn dismiss(&self, granule: usize) {
        let _ = self.uffd.wake(granule, GRANULE);
        self.monitor.waiters.remove(granule, |_| ());
    }

    /// Moves `steps.len()` neighbouring granules (1 to [`RUN`]) from `va` on.
    ///
    /// # Errors
    /// See [`RebindError`]: granules have either backing, never none, and no
    /// content is lost.
    ///
    /// # Safety
    /// `va` is a multiple of [`GRANULE`]; each granule is mapped as its `from`
    /// says, readable and writable, and is not taken; each
    /// [`Memory::Extent`] is the address of a granule of a shared mapping
    /// that stays valid, its content known to nobody but the caller; `live`
    /// names every page whose content matters.
    pub unsafe fn rebind(&mut self, va: usize, steps: &[Step<'_>]) -> Result<Moved, RebindError> {
        let start = now();
        let mut from = [Memory::Dram; RUN];
        for (from, step) in from.iter_mut().zip(steps) {
            *from = step.from;
        }
        let from = &from[..steps.len()];
        for (i, step) in steps.iter().enumerate() {
            if let Memory::Extent(alias) = step.from {
                let granule = va + i * GRANULE;
                populate_live(alias, step.live, Advice::LinuxPopulateRead)
                    .map_err(|errno| RebindError::Unreadable { granule, errno })?;
            }
        }
        // SAFETY: the caller's.
        let mut spare = unsafe { Spare::prepare(steps) }?;
        let taking = now();
        // SAFETY: the caller's.
        let mut taken = unsafe { self.take(va, from) }?;
        let mut bytes_copied = 0;
        while let Some(i) = self.next(&taken) {
            // SAFETY: content and spare are whole granules; no thread knows
            // either but this one.
            unsafe { copy_live(taken.content(i), spare.granule(i), steps[i].live) };
            // SAFETY: granule `i` waits, and its spare is filled.
            if let Err(errno) = unsafe { self.give(taken.granule(i), &mut spare, i) } {
                // What it frees is what the kernel lacked.
                drop(spare);
                let stayed = taken.waiting();
                let moved = ((1 << steps.len()) - 1) & !stayed;
                // SAFETY: the caller's, and nothing wrote to the old backing.
                unsafe { self.put_back_rest(taken, moved) }?;
                return Err(RebindError::Partly { stayed, errno });
            }
            taken.now_given(i);
            bytes_copied += u64::from(steps[i].live.count()) * PAGE as u64;
        }
        let end = now();
        Ok(Moved {
            bytes_copied,
            longest_hold: end - taking,
            duration: end - start,
        })
    }

    /// Takes the content of `from.len()` neighbouring granules (1 to [`RUN`])
    /// away: on return, whoever touches one waits, and no direct I/O that
    /// began before uses its pages.
    ///
    /// # Errors
    /// As [`rebind`](Self::rebind); it never moves a part.
    ///
    /// # Safety
    /// As [`rebind`](Self::rebind). What was taken is given or put back.
    pub unsafe fn take(&mut self, va: usize, from: &[Memory]) -> Result<Taken, RebindError> {
        debug_assert!(va.is_multiple_of(GRANULE) && (1..=RUN).contains(&from.len()));
        self.check(va, from)?;
        if self.reserve.is_none() {
            self.reserve = Some(Reserve::fill()?);
        }
        let mut taken = Taken::none_of(va, from);
        if self.away == 0 {
            // Waits that the monitor heard of after their end.
            self.monitor.waiters.clear();
        }
        let begun = now();
        let mut i = 0;
        while i < from.len() {
            // SAFETY: the caller's.
            match unsafe { self.take_some(&mut taken, i, &from[i..]) } {
                Ok(n) => {
                    taken.now_taken(i..i + n);
                    self.away += n;
                    i += n;
                }
                Err(error) => {
                    // SAFETY: as above; content was not touched.
                    unsafe { self.put_back(taken) }?;
                    return Err(error);
                }
            }
        }
        let at = taken.range();
        if self.guarded && !self.transfers.end(&at, begun, &self.monitor.waiters) {
            // SAFETY: as above.
            unsafe { self.put_back(taken) }?;
            return Err(RebindError::InTransfer { at });
        }
        Ok(taken)
    }

    /// Takes granules of one kind from the `i`th of the run on; says how many.
    unsafe fn take_some(
        &mut self,
        taken: &mut Taken,
        i: usize,
        from: &[Memory],
    ) -> Result<usize, RebindError> {
        let va = taken.granule(i);
        if from[0] != Memory::Dram {
            let n = from.iter().take_while(|&&f| f != Memory::Dram).count();
            if self.guarded {
                let mut placeholder = placeholder::build(&self.uffd, n)?;
                // SAFETY: the granules are the caller's to replace, and their
                // content stays in the extent.
                unsafe { placeholder.move_to(0, n, va) }?;
            }
            return Ok(n);
        }
        let n = from.iter().take_while(|&&f| f == Memory::Dram).count();
        // mremap(2) moves no more than one mapping.
        let end = self.mappings.end_of(va, va + n * GRANULE)?;
        let n = (end - va) / GRANULE;
        let len = end - va;
        if self.guarded {
            self.uffd.register(va, len)?;
        }
        // SAFETY: the granules are the caller's, and anonymous memory.
        if let Err(errno) = unsafe { taken.content.take_from(i, n, va) } {
            let _ = self.uffd.unregister(va, len);
            return Err(errno.into());
        }
        // A child would read zeroes here.
        let _ = advise(va, len, Advice::LinuxDontFork);
        if self.guarded {
            // The registration moved along, and would make us wait for the
            // pages that are missing.
            let unregistered = self.uffd.unregister(taken.content.granule(i), len);
            if let Err(errno) = unregistered {
                taken.now_taken(i..i + n);
                self.away += n;
                return Err(errno.into());
            }
        }
        Ok(n)
    }

    /// Puts granule `i` of `spare` in place at `va` and wakes who waits.
    ///
    /// # Errors
    /// The kernel's (`ENOMEM`): the granule waits on, the spare is as it was.
    ///
    /// # Safety
    /// The granule at `va` is taken; the spare holds what is live of it.
    pub unsafe fn give(&mut self, va: usize, spare: &mut Spare, i: usize) -> Result<(), Errno> {
        // SAFETY: the caller's.
        unsafe { self.place(va, &mut spare.staging, i) }
    }

    /// Puts a granule of a shared mapping in place at `va`, as [`give`](Self::give) does.
    ///
    /// # Errors
    /// As [`give`](Self::give).
    ///
    /// # Safety
    /// The granule at `va` is taken; `alias` is a granule of a shared mapping.
    pub unsafe fn give_shared(&mut self, va: usize, alias: usize) -> Result<(), Errno> {
        // SAFETY: the caller's.
        unsafe { self.place_extent(va, alias) }
    }

    /// How many more mappings the process may have (`vm.max_map_count`).
    pub fn room_for_mappings(&self) -> usize {
        self.mappings.room()
    }

    /// A granule that was taken is wanted by nobody any more, and unmapped.
    pub fn forget(&mut self) {
        self.away -= 1;
    }

    /// Gives granules that wait their old backing again.
    ///
    /// # Errors
    /// [`RebindError::Stuck`] with those that still wait.
    ///
    /// # Safety
    /// As [`rebind`](Self::rebind); the old backing was not written to.
    pub unsafe fn put_back(&mut self, taken: Taken) -> Result<(), RebindError> {
        // SAFETY: the caller's.
        unsafe { self.put_back_rest(taken, 0) }
    }

    /// # Safety
    /// As [`put_back`](Self::put_back), for a run of which `moved` is moved.
    unsafe fn put_back_rest(&mut self, mut taken: Taken, moved: u32) -> Result<(), RebindError> {
        while let Some(i) = taken.first_waiting() {
            let va = taken.granule(i);
            let placed = match taken.from(i) {
                // SAFETY: the granule is taken and its content staged.
                Memory::Dram => unsafe { self.place(va, &mut taken.content, i) },
                // SAFETY: the extent is still mapped and holds the content.
                Memory::Extent(alias) => unsafe { self.place_extent(va, alias) },
            };
            if let Err(errno) = placed {
                return Err(RebindError::Stuck {
                    taken,
                    moved,
                    errno,
                });
            }
            taken.now_given(i);
        }
        Ok(())
    }

    /// Whether extents in a range are mapped as they were, so that their
    /// mapping may be replaced.
    pub fn are_unchanged(&self, extents: Range<usize>) -> bool {
        self.mappings.changed(extents, true) == Ok(None)
    }

    /// The same of placeholders, which no program knows of.
    pub fn is_as_covered(&self, placeholders: Range<usize>) -> bool {
        self.mappings.changed(placeholders, false) == Ok(None)
    }

    /// Waits until no direct I/O has pages of a range that is behind
    /// placeholders since `taken` (CLOCK_MONOTONIC, ns). `false`: some has, or may.
    pub fn no_transfer(&self, range: &Range<usize>, taken: u64) -> bool {
        self.transfers.end(range, taken, &self.monitor.waiters)
    }

    /// Lets granules be moved without a placeholder, which loses what threads
    /// write meanwhile: for a test that its storm would notice.
    #[doc(hidden)]
    pub fn leave_unguarded(&mut self) {
        self.guarded = false;
    }

    /// # Safety
    /// The granule at `va` is taken, and `staging`'s is to be its backing.
    unsafe fn place(&mut self, va: usize, staging: &mut Staging, i: usize) -> Result<(), Errno> {
        // SAFETY: the caller's.
        let mut placed = unsafe { staging.move_to(i, 1, va) };
        if placed == Err(Errno::NOMEM) && self.reserve.take().is_some() {
            // SAFETY: as above; a failure left everything as it was.
            placed = unsafe { staging.move_to(i, 1, va) };
        }
        placed?;
        self.away -= 1;
        // Fails on addresses outside the process only.
        let _ = self.uffd.wake(va, GRANULE);
        let woken = now();
        self.monitor.waiters.remove(va, |since| {
            self.monitor.stalls.record(woken.saturating_sub(since));
        });
        Ok(())
    }

    /// # Safety
    /// As [`place`](Self::place) with the granule of an extent at `alias`.
    unsafe fn place_extent(&mut self, va: usize, alias: usize) -> Result<(), Errno> {
        let mut old = Staging::EMPTY;
        // SAFETY: the caller's.
        let mut mapped = unsafe { old.map_extent(0, alias) };
        if mapped == Err(Errno::NOMEM) && self.reserve.take().is_some() {
            // SAFETY: as above.
            mapped = unsafe { old.map_extent(0, alias) };
        }
        mapped?;
        // SAFETY: as above.
        unsafe { self.place(va, &mut old, 0) }
    }

    /// Which granule of the run to move next.
    fn next(&self, taken: &Taken) -> Option<usize> {
        let wanted = self.monitor.waiters.longest(taken.range());
        wanted
            .map(|va| (va - taken.granule(0)) / GRANULE)
            .filter(|&i| taken.waits(i))
            .or_else(|| taken.first_waiting())
    }

    /// Refuses what the program has changed.
    fn check(&self, va: usize, from: &[Memory]) -> Result<(), RebindError> {
        let mut i = 0;
        for same in from.chunk_by(|a, b| (*a == Memory::Dram) == (*b == Memory::Dram)) {
            let at = va + i * GRANULE..va + (i + same.len()) * GRANULE;
            let shared = same[0] != Memory::Dram;
            if let Some(change) = self.mappings.changed(at.clone(), shared)? {
                return Err(RebindError::Changed { at, change });
            }
            i += same.len();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_that_threads_wait_for_go_first() {
        static MONITOR: Monitor = Monitor::new();
        let mover = Mover::start(&MONITOR, None).unwrap();
        let mut taken = Taken::none_of(64 * GRANULE, &[Memory::Dram; RUN]);
        taken.now_taken(0..RUN);
        MONITOR.waiters.insert(taken.granule(5) + 4096, 1, 20);
        MONITOR.waiters.insert(taken.granule(3), 2, 10);
        MONITOR.waiters.insert(taken.granule(RUN), 3, 5);
        let mut order = Vec::new();
        while let Some(i) = mover.next(&taken) {
            order.push(i);
            taken.now_given(i);
            MONITOR.waiters.remove(taken.granule(i), |_| ());
        }
        assert_eq!(order, [3, 5, 0, 1, 2, 4, 6, 7]);
    }
}
