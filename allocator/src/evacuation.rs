//! Moving live granules: off extents that are recalled, and back.
//!
//! Runs on the heap's worker thread and, where granules are spilled, on its
//! restorer, one at a time. It never allocates, and calls nothing that takes a
//! lock of the engine: a thread may hold one while it waits for a granule.

use core::ops::Range;
use core::time::Duration;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use crate::heap::Heap;
use crate::source::{ExtentSource, Recall, Refusal};
use crate::space::rebind::Taken;
use crate::space::rebind::{self, Memory, Monitor, Mover, RUN, RebindError, Spare, StallHistogram};
use crate::space::{Backing, Fate, GRANULE, Leaving, Move, PAGES_PER_GRANULE};
use crate::spill::{Spill, SpillState};

/// The monitor thread's part, which outlives everything.
static MONITOR: Monitor = Monitor::new();

/// Mappings that are left to the program: recalls take none of the last ones.
const MAPPINGS_LEFT: usize = 512;
/// What a granule that moves may add to the mappings: it can split the one it
/// is taken from in two, and become one of its own.
const MAPPINGS_EACH: usize = 2;

/// So many granules that can't be brought back are passed over at a time.
const FAILURES: usize = 4;

/// So often what direct I/O was using is tried once more.
const TRIES: u32 = 5;

/// What was moved, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Evacuated {
    /// Of granules that are on other extents now.
    pub(crate) to_extents: u64,
    /// Of granules that are in DRAM now.
    pub(crate) to_dram: u64,
    /// Of granules that are in the file now.
    pub(crate) spilled: u64,
    /// Of live pages in them.
    pub(crate) copied: u64,
    /// How long it took.
    pub(crate) moving: Duration,
    /// Why others are not.
    pub(crate) stopped: Option<Refusal>,
}

impl Evacuated {
    pub(crate) fn bytes(&self) -> u64 {
        self.to_extents + self.to_dram + self.spilled
    }

    fn granules(&self) -> usize {
        self.bytes() as usize / GRANULE
    }

    fn add(&mut self, more: &Self) {
        self.to_extents += more.to_extents;
        self.to_dram += more.to_dram;
        self.spilled += more.spilled;
        self.copied += more.copied;
        self.moving += more.moving;
        self.stopped = more.stopped.or(self.stopped);
    }
}

/// Moves granules of a heap.
pub(crate) struct Evacuator {
    mover: Mover,
    spill: Option<Spill>,
    /// Something stayed because direct I/O was using it.
    in_transfer: bool,
}

// SAFETY: a mover must not leave the threads that share its descriptor table;
// worker and restorer do, and nobody else gets hold of it.
unsafe impl Send for Evacuator {}

impl Evacuator {
    /// Takes what it needs of the calling thread, which must be the worker.
    /// `None`: no userfaultfd, or one that can't block the kernel's own
    /// accesses: system calls of the program would fail with EFAULT, and so
    /// nothing is moved, unless the settings want it (`moves:user`).
    pub(crate) fn start(heap: &Heap, source: &dyn ExtentSource) -> Option<Self> {
        let mover = Mover::start(&MONITOR, source.userfaultfd()).ok()?;
        if !(mover.takes_kernel_faults() || heap.config().user_moves) {
            return None;
        }
        heap.note_user_moves(!mover.takes_kernel_faults());
        let dir = heap.config().spill_dir;
        let spill = dir.and_then(|dir| Spill::open(dir.as_c_str(), heap.space().granules()).ok());
        heap.note_spill(match (&dir, &spill) {
            (None, _) => SpillState::Off,
            (_, None) => SpillState::Unusable,
            (_, Some(spill)) if spill.has_ring() => SpillState::Ring,
            _ => SpillState::NoRing,
        });
        Some(Self {
            mover,
            spill,
            in_transfer: false,
        })
    }

    /// Readable when threads began to wait; `None` if nothing is ever spilled.
    pub(crate) fn bell(&self) -> Option<BorrowedFd<'_>> {
        self.spill.as_ref().map(|_| self.mover.bell())
    }

    /// Whether extents in a range are mapped as they were.
    pub(crate) fn are_unchanged(&self, extents: Range<usize>) -> bool {
        self.mover.are_unchanged(extents)
    }

    /// The same of placeholders that a fork put over extents.
    pub(crate) fn is_as_covered(&self, placeholders: Range<usize>) -> bool {
        self.mover.is_as_covered(placeholders)
    }

    /// The time, for [`Self::no_transfer`].
    pub(crate) fn now(&self) -> u64 {
        rebind::now()
    }

    /// Waits until no direct I/O uses the pages of a range any more that is
    /// behind placeholders since `taken`. `false`: some still does, or may.
    pub(crate) fn no_transfer(&self, range: &Range<usize>, taken: u64) -> bool {
        self.mover.no_transfer(range, taken)
    }

    /// How long threads waited for granules.
    pub(crate) fn stalls(&self) -> StallHistogram {
        self.mover.stalls()
    }

    /// Moves live granules off recalled extents and gives those back, until
    /// `until` if that is given.
    pub(crate) fn recall(
        &mut self,
        heap: &Heap,
        source: &dyn ExtentSource,
        recall: &Recall,
        until: Option<Instant>,
    ) -> Evacuated {
        heap.space().forgive();
        let leaving = Leaving {
            wanted: recall.ranges.as_slice(),
            granules: usize::MAX,
            to_extents: true,
            dram: 0,
            spill: 0,
        };
        let mut done = Evacuated::default();
        let mut may_move = self.movable();
        let mut tries = TRIES;
        while done.bytes() < recall.bytes {
            if until.is_some_and(|until| Instant::now() >= until) {
                done.stopped = Some(Refusal::Deadline);
                break;
            }
            if may_move < RUN {
                // Most neighbours have become one mapping again.
                may_move = self.movable();
            }
            if may_move == 0 {
                done.stopped = Some(Refusal::Mappings);
                break;
            }
            let left = ((recall.bytes - done.bytes()) as usize).div_ceil(GRANULE);
            let left = left.min(may_move);
            self.restore_wanted(heap, source);
            let dram = heap.dram_allowance();
            let spill = self.spill.as_ref().map(|_| heap.spill_allowance());
            let Some(picked) = heap.space().pick_leaving(Leaving {
                granules: left,
                dram,
                spill: spill.unwrap_or(0),
                ..leaving
            }) else {
                if self.may_try_again(heap, &mut tries) {
                    continue;
                }
                let lacks = match spill {
                    None => Refusal::NoDram,
                    Some(_) => Refusal::SpillFull,
                };
                done.stopped = (dram < GRANULE as u64).then_some(lacks).or(done.stopped);
                break;
            };
            may_move -= picked.granules();
            let moved = self.carry_out(heap, source, picked);
            heap.note_evacuated(moved.granules());
            done.add(&moved);
        }
        done
    }

    /// Granules that may move before the process has too many mappings.
    pub(crate) fn movable(&self) -> usize {
        self.mover.room_for_mappings().saturating_sub(MAPPINGS_LEFT) / MAPPINGS_EACH
    }

    /// Whether granules stayed only because direct I/O was using them, which
    /// may have ended by now.
    fn may_try_again(&mut self, heap: &Heap, tries: &mut u32) -> bool {
        let again = core::mem::take(&mut self.in_transfer) && *tries > 0;
        if again {
            *tries -= 1;
            heap.space().forgive();
        }
        again
    }

    /// Moves everything off extents that can be moved, into as much DRAM as it
    /// takes.
    pub(crate) fn clear(&mut self, heap: &Heap, source: &dyn ExtentSource) {
        heap.space().forgive();
        let leaving = Leaving {
            wanted: &[],
            granules: usize::MAX,
            to_extents: false,
            dram: u64::MAX,
            spill: 0,
        };
        let mut tries = TRIES;
        loop {
            if let Some(picked) = heap.space().pick_leaving(leaving) {
                let moved = self.carry_out(heap, source, picked);
                heap.note_evacuated(moved.granules());
            } else if !self.may_try_again(heap, &mut tries) {
                break;
            }
        }
        // A child would find nothing where they are.
        while let Some(granule) = heap.space().next_spilled() {
            if !self.restore(heap, source, granule, false) {
                break;
            }
        }
    }

    /// Moves up to `most` granules that are in DRAM for want of extents to unused
    /// ones; how many.
    pub(crate) fn bring_back(
        &mut self,
        heap: &Heap,
        source: &dyn ExtentSource,
        most: usize,
    ) -> usize {
        let mut moved = 0;
        // A fork would have to move it all off again.
        let goes_on = || !heap.service().is_to_stop();
        while moved < most
            && goes_on()
            && let Some(granule) = heap.space().next_restorable()
            && self.restore(heap, source, granule, true)
        {
            moved += 1;
        }
        let mut failures = 0;
        while moved < most
            && goes_on()
            && failures < FAILURES
            && let Some(picked) = heap.space().pick_returning(most - moved)
        {
            let back = self.carry_out(heap, source, picked);
            moved += back.granules();
            failures += usize::from(back.stopped.is_some());
        }
        heap.note_promoted(moved);
        moved
    }

    /// Moves, books, gives back.
    fn carry_out(&mut self, heap: &Heap, source: &dyn ExtentSource, picked: Move) -> Evacuated {
        let start = Instant::now();
        let all = picked.granules();
        let mut stayed = [None; RUN];
        let mut go = |some, stayed: &mut _| match picked.is_spill() {
            true => self.spill(&picked, some, stayed),
            false => self.rebind(&picked, some, stayed),
        };
        go(0..all, &mut stayed);
        if all > 1 && stayed[..all].iter().all(Option::is_some) {
            // One that can't be moved holds up its neighbours.
            stayed = [None; RUN];
            for i in 0..all {
                go(i..i + 1, &mut stayed);
            }
        }
        let stopped = stayed.iter().copied().flatten().last();
        let ended = heap.space().end_move(picked, &stayed);
        if !ended.freed.is_empty() {
            source.give_back(&ended.freed);
        }
        heap.service().lose_landed(heap, source);
        Evacuated {
            to_extents: (ended.to_extents * GRANULE) as u64,
            to_dram: (ended.to_dram * GRANULE) as u64,
            spilled: (ended.spilled * GRANULE) as u64,
            copied: ended.copied,
            moving: start.elapsed(),
            stopped,
        }
    }

    /// One rebind, of some granules of a move; says in `stayed` of each that
    /// is where it was why.
    fn rebind(&mut self, picked: &Move, some: Range<usize>, stayed: &mut [Option<Refusal>; RUN]) {
        let all = (1u32 << some.len()) - 1;
        let first = some.start;
        let result = picked.with_steps(|steps| {
            let at = picked.addr() + first * GRANULE;
            // SAFETY: the granules are the space's own, in flight by its
            // books, backed as they say; extents lie in the window, which
            // stays, and are lent to this process alone; `live` was taken
            // when nothing more could be handed out.
            unsafe { self.mover.rebind(at, &steps[some]) }
        });
        if let Err(error) = result {
            let (which, why) = self.reason(error, all);
            for i in (0..RUN - first).filter(|i| which & (1 << i) != 0) {
                stayed[first + i] = Some(why);
            }
        }
    }

    /// What to say of a run of granules of which `all` were to move: a bit for
    /// each that stayed, and why.
    fn reason(&mut self, error: RebindError, all: u32) -> (u32, Refusal) {
        match error {
            RebindError::Partly { stayed, .. } => (stayed, Refusal::NoDram),
            RebindError::NoMemory(_) => (all, Refusal::NoDram),
            RebindError::Changed { .. } => (all, Refusal::MappingChanged),
            RebindError::InTransfer { .. } => {
                self.in_transfer = true;
                (all, Refusal::CannotMove)
            }
            RebindError::Stuck { taken, moved, .. } => {
                self.insist(taken);
                (all & !moved, Refusal::NoDram)
            }
            _ => (all, Refusal::CannotMove),
        }
    }

    /// Writes some granules of a move to the file and leaves them behind their
    /// placeholders; says in `stayed` of each that is where it was why.
    fn spill(&mut self, picked: &Move, some: Range<usize>, stayed: &mut [Option<Refusal>; RUN]) {
        let first = some.start;
        let at = picked.addr() + first * GRANULE;
        let mut from = [Memory::Dram; RUN];
        let mut readable = Ok(());
        picked.with_steps(|steps| {
            for (from, step) in from.iter_mut().zip(&steps[some.clone()]) {
                *from = step.from;
                if let Memory::Extent(alias) = step.from {
                    readable = readable.and(rebind::readable(alias, step.live));
                }
            }
        });
        let why = match (readable, &self.spill) {
            (Err(_), _) | (_, None) => Err(Refusal::CannotMove),
            // SAFETY: as in `rebind`.
            _ => match unsafe { self.mover.take(at, &from[..some.len()]) } {
                Ok(taken) => self.write(picked, some.clone(), taken),
                Err(error) => Err(self.reason(error, 0).1),
            },
        };
        if let Err(why) = why {
            stayed[some].fill(Some(why));
        }
    }

    /// Writes what was taken to the file, or gives it back.
    fn write(&mut self, picked: &Move, some: Range<usize>, taken: Taken) -> Result<(), Refusal> {
        let Some(spill) = &mut self.spill else {
            self.insist(taken);
            return Err(Refusal::CannotMove);
        };
        let granules = some.clone().map(|i| {
            let content = taken.content(i - some.start);
            (picked.index() + i, content, picked.live(i))
        });
        // SAFETY: content that was taken is nobody's to write to, and what is
        // live of it could be read just now.
        if unsafe { spill.write(granules) }.is_ok() {
            // The granules stay behind their placeholders.
            drop(taken);
            return Ok(());
        }
        // SAFETY: nobody wrote to the old backing.
        if let Err(RebindError::Stuck { taken, .. }) = unsafe { self.mover.put_back(taken) } {
            self.insist(taken);
        }
        Err(Refusal::SpillFailed)
    }

    /// Brings every spilled granule back that a thread waits for. `false`:
    /// there is no memory for some, and they still wait.
    pub(crate) fn restore_wanted(&mut self, heap: &Heap, source: &dyn ExtentSource) -> bool {
        if self.spill.is_none() {
            return true;
        }
        while let Some(granule) = self.mover.wanted(heap.space().range()) {
            if heap.space().backing_of(granule) != Some(Backing::Spilled) {
                self.mover.dismiss(granule);
            } else if !self.restore(heap, source, granule, true) {
                return false;
            }
        }
        true
    }

    /// Brings a spilled granule back, to an extent if one is unused and
    /// `to_extents` says so. `false`: there is no memory for it at present.
    fn restore(
        &mut self,
        heap: &Heap,
        source: &dyn ExtentSource,
        granule: usize,
        to_extents: bool,
    ) -> bool {
        let Some(spill) = &self.spill else {
            return false;
        };
        let Some(picked) = heap.space().pick_restoring(granule, to_extents) else {
            return true;
        };
        let (index, live) = (picked.index(), *picked.live(0));
        // SAFETY: extents lie in the window, which is a shared mapping.
        let spare = picked.with_steps(|steps| unsafe { Spare::prepare(steps) });
        // Lost on its way to the file, whatever is in there.
        let fate = heap.space().take_fate(granule);
        let mut stayed = [Some(Refusal::NoDram); RUN];
        let mut dead = fate == Some(Fate::Fault);
        let mut unread = None;
        if !dead && let Ok(mut spare) = spare {
            let read = match fate {
                // SAFETY: a spare is nobody's.
                None => unsafe { spill.read(index, spare.granule(0), &live) },
                Some(_) => Ok(()),
            };
            if let Err(error) = read {
                dead = true;
                unread = Some(error);
            // SAFETY: a spilled granule is taken, and this is what was live of
            // it, or zeroes.
            } else if unsafe { self.mover.give(granule, &mut spare, 0) }.is_ok() {
                stayed[0] = None;
            }
        }
        if dead {
            // SAFETY: as above; a mapping of its own that raises SIGBUS.
            dead = unsafe { self.mover.give_shared(granule, heap.space().dead()) }.is_ok();
        }
        if dead {
            heap.space().lose_spilled(granule);
            unread
                .into_iter()
                .for_each(|error| heap.note_spill_lost(error));
        }
        let back = stayed[0].is_none();
        if back || dead {
            spill.drop_pages(index, 0..PAGES_PER_GRANULE);
        } else {
            heap.space().put_back_fate(granule, fate);
        }
        let ended = heap.space().end_move(picked, &stayed);
        if !ended.freed.is_empty() {
            source.give_back(&ended.freed);
        }
        heap.service().lose_landed(heap, source);
        heap.note_restored(usize::from(back));
        back || dead
    }

    /// Gives the file's blocks of what the program has freed back.
    pub(crate) fn sweep(&mut self, heap: &Heap) {
        let Some(spill) = &self.spill else {
            return;
        };
        let mover = &mut self.mover;
        heap.space().sweep_spilled(|index, pages, bare| {
            for run in pages.runs() {
                spill.drop_pages(index, run);
            }
            if bare {
                mover.forget();
            }
        });
    }

    /// The kernel has memory for neither mapping: threads wait until it has
    /// some for the old one.
    fn insist(&mut self, mut taken: Taken) {
        loop {
            std::thread::sleep(Duration::from_millis(10));
            // SAFETY: as when they were taken; nobody wrote to the old backing.
            match unsafe { self.mover.put_back(taken) } {
                Err(RebindError::Stuck { taken: rest, .. }) => taken = rest,
                _ => return,
            }
        }
    }
}
