//! Moving live granules: off extents that are recalled, and back.
//!
//! Runs on the heap's worker thread alone, which owns the [`Mover`]. It never
//! allocates, and holds no lock while it moves.

use core::ops::Range;
use core::time::Duration;
use std::time::Instant;

use crate::heap::Heap;
use crate::source::{ExtentSource, Recall, Refusal};
use crate::space::rebind::{Monitor, Mover, RebindError, Taken};
use crate::space::{GRANULE, Leaving, Move};
use crate::stats::Stalls;

/// The monitor thread's part, which outlives everything.
static MONITOR: Monitor = Monitor::new();

/// What was moved.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Evacuated {
    /// Bytes of granules that are elsewhere now.
    pub(crate) bytes: u64,
    /// Why others are not.
    pub(crate) stopped: Option<Refusal>,
}

impl Evacuated {
    fn granules(&self) -> usize {
        self.bytes as usize / GRANULE
    }
}

/// Moves granules of a heap.
pub(crate) struct Evacuator {
    mover: Mover,
}

impl Evacuator {
    /// Takes what it needs of the calling thread, which must be the worker.
    /// `None`: no userfaultfd, or one that can't block the kernel's own
    /// accesses: system calls of the program would fail with EFAULT, and so
    /// nothing is moved.
    pub(crate) fn start(source: &dyn ExtentSource) -> Option<Self> {
        let mover = Mover::start(&MONITOR, source.userfaultfd()).ok()?;
        mover.takes_kernel_faults().then_some(Self { mover })
    }

    /// Whether extents in a range are mapped as they were.
    pub(crate) fn are_unchanged(&self, extents: Range<usize>) -> bool {
        self.mover.are_unchanged(extents)
    }

    /// How long threads waited for granules.
    pub(crate) fn stalls(&self) -> Stalls {
        (&self.mover.stalls()).into()
    }

    /// Moves live granules off recalled extents and gives those back.
    pub(crate) fn recall(
        &mut self,
        heap: &Heap,
        source: &dyn ExtentSource,
        recall: &Recall,
        until: Instant,
    ) -> Evacuated {
        heap.space().forgive();
        let leaving = Leaving {
            wanted: recall.ranges.as_slice(),
            granules: usize::MAX,
            to_extents: true,
            dram: 0,
        };
        let mut done = Evacuated::default();
        while done.bytes < recall.bytes {
            if Instant::now() >= until {
                done.stopped = Some(Refusal::Deadline);
                break;
            }
            let left = ((recall.bytes - done.bytes) as usize).div_ceil(GRANULE);
            let dram = heap.dram_allowance();
            let Some(picked) = heap.space().pick_leaving(Leaving {
                granules: left,
                dram,
                ..leaving
            }) else {
                done.stopped = (dram < GRANULE as u64)
                    .then_some(Refusal::NoDram)
                    .or(done.stopped);
                break;
            };
            let moved = self.carry_out(heap, source, picked);
            heap.note_evacuated(moved.granules());
            done.bytes += moved.bytes;
            done.stopped = moved.stopped.or(done.stopped);
        }
        done
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
        };
        while let Some(picked) = heap.space().pick_leaving(leaving) {
            let moved = self.carry_out(heap, source, picked);
            heap.note_evacuated(moved.granules());
        }
    }

    /// Moves some granules that are in DRAM for want of extents to unused
    /// ones; how many.
    pub(crate) fn bring_back(&mut self, heap: &Heap, source: &dyn ExtentSource) -> usize {
        let (mut moved, most) = (0, heap.back_per_tick());
        while moved < most
            && let Some(picked) = heap.space().pick_returning(most - moved)
        {
            let back = self.carry_out(heap, source, picked);
            moved += back.granules();
            if back.stopped.is_some() {
                break;
            }
        }
        heap.note_promoted(moved);
        moved
    }

    /// Moves, books, gives back.
    fn carry_out(&mut self, heap: &Heap, source: &dyn ExtentSource, picked: Move) -> Evacuated {
        let all = picked.granules();
        let (mut stayed, mut stopped) = self.rebind(&picked, 0..all);
        if stayed == (1 << all) - 1 && all > 1 {
            // One that can't be moved holds up its neighbours.
            (stayed, stopped) = (0, None);
            for i in 0..all {
                let (this, refusal) = self.rebind(&picked, i..i + 1);
                stayed |= this << i;
                stopped = refusal.or(stopped);
            }
        }
        let ended = heap.space().end_move(picked, stayed);
        if !ended.freed.is_empty() {
            source.give_back(&ended.freed);
        }
        Evacuated {
            bytes: (ended.moved * GRANULE) as u64,
            stopped,
        }
    }

    /// One rebind, of some granules of a move: a bit for each that stayed
    /// where it was, and why.
    fn rebind(&mut self, picked: &Move, some: Range<usize>) -> (u32, Option<Refusal>) {
        let all = (1u32 << some.len()) - 1;
        let result = picked.with_steps(|steps| {
            let at = picked.addr() + some.start * GRANULE;
            // SAFETY: the granules are the space's own, in flight by its
            // books, backed as they say; extents lie in the window, which
            // stays, and are lent to this process alone; `live` was taken
            // when nothing more could be handed out.
            unsafe { self.mover.rebind(at, &steps[some]) }
        });
        match result {
            Ok(_) => (0, None),
            Err(RebindError::Partly { stayed, .. }) => (stayed, Some(Refusal::NoDram)),
            Err(RebindError::NoMemory(_)) => (all, Some(Refusal::NoDram)),
            Err(RebindError::Changed { .. }) => (all, Some(Refusal::MappingChanged)),
            Err(RebindError::Stuck { taken, moved, .. }) => {
                self.insist(taken);
                (all & !moved, Some(Refusal::NoDram))
            }
            Err(_) => (all, Some(Refusal::CannotMove)),
        }
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
