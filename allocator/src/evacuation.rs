//! Moving live granules: off extents that are recalled, and back.
//!
//! Runs on the heap's worker thread alone, which owns the [`Mover`]. It never
//! allocates, and holds no lock while it moves.

use core::time::Duration;
use std::time::Instant;

use crate::heap::Heap;
use crate::source::{ExtentSource, Recall, Refusal};
use crate::space::rebind::{Monitor, Mover, RebindError, Taken};
use crate::space::{GRANULE, Leaving, Move};
use crate::stats::Stalls;

/// The monitor thread's part, which outlives everything.
static MONITOR: Monitor = Monitor::new();

/// What an evacuation returned.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Evacuated {
    /// Bytes of extents freed and given back.
    pub(crate) bytes: u64,
    /// Why it did not go on.
    pub(crate) stopped: Option<Refusal>,
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
            match self.carry_out(heap, source, picked) {
                Ok(bytes) => done.bytes += bytes,
                Err(refusal) => done.stopped = Some(refusal),
            }
        }
        done
    }

    /// Moves everything off extents, into as much DRAM as it takes; whether
    /// nothing is left there.
    pub(crate) fn clear(&mut self, heap: &Heap, source: &dyn ExtentSource) -> bool {
        heap.space().forgive();
        let leaving = Leaving {
            wanted: &[],
            granules: usize::MAX,
            to_extents: false,
            dram: u64::MAX,
        };
        while let Some(picked) = heap.space().pick_leaving(leaving) {
            let _ = self.carry_out(heap, source, picked);
        }
        !heap.space().extents_in_use()
    }

    /// Moves some granules that are in DRAM for want of extents to unused
    /// ones; how many.
    pub(crate) fn bring_back(&mut self, heap: &Heap, source: &dyn ExtentSource) -> usize {
        let (mut moved, most) = (0, heap.back_per_tick());
        while moved < most
            && let Some(picked) = heap.space().pick_returning(most - moved)
        {
            moved += picked.granules();
            if self.carry_out(heap, source, picked).is_err() {
                break;
            }
        }
        heap.note_promoted(moved);
        moved
    }

    /// One rebind: moves, books, gives back. Bytes of extents freed.
    fn carry_out(
        &mut self,
        heap: &Heap,
        source: &dyn ExtentSource,
        picked: Move,
    ) -> Result<u64, Refusal> {
        let all = (1u32 << picked.granules()) - 1;
        let result = picked.with_steps(|steps| {
            // SAFETY: the granules are the space's own, in flight by its
            // books, backed as they say; extents lie in the window, which
            // stays, and are lent to this process alone; `live` was taken
            // when nothing more could be handed out.
            unsafe { self.mover.rebind(picked.addr(), steps) }
        });
        let (stayed, refusal) = match result {
            Ok(_) => (0, None),
            Err(RebindError::Partly { stayed, .. }) => (stayed, Some(Refusal::NoDram)),
            Err(RebindError::NoMemory(_)) => (all, Some(Refusal::NoDram)),
            Err(RebindError::Changed { .. }) => (all, Some(Refusal::MappingChanged)),
            Err(RebindError::Stuck { taken, moved, .. }) => {
                self.insist(taken);
                (all & !moved, Some(Refusal::NoDram))
            }
            Err(_) => (all, Some(Refusal::CannotMove)),
        };
        let ended = heap.space().end_move(picked, stayed);
        if !ended.freed.is_empty() {
            source.give_back(&ended.freed);
            heap.note_evacuated(ended.moved);
        }
        refusal.map_or(Ok(ended.freed.bytes()), Err)
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
