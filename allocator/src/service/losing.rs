//! What a device took by force, or what is broken.

use core::sync::atomic::Ordering;
use core::time::Duration;
use std::time::Instant;

use super::Service;
use crate::arena;
use crate::heap::Heap;
use crate::sigbus;
use crate::source::{ExtentSource, Ranges, WindowRange};
use crate::space::GRANULE;

/// A move that is under way holds up a loss no longer than this.
const PATIENCE: Duration = Duration::from_secs(5);

impl Service {
    /// Puts zeroes, or what raises SIGBUS, behind what is lost and tells its
    /// owners, before anything else: on the thread that hears, since the
    /// worker may be at work for seconds.
    pub(super) fn lose(&self, heap: &Heap, gone: &Ranges) {
        let until = Instant::now() + PATIENCE;
        self.lose_in_use(heap, gone.as_slice());
        while heap.space().holds_any(gone.as_slice()) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
            self.lose_in_use(heap, gone.as_slice());
        }
        if let Some(free) = self.lost.lock().iter_mut().find(|slot| slot.is_none()) {
            *free = Some(*gone);
        }
        heap.wanted().raise();
    }

    fn lose_in_use(&self, heap: &Heap, gone: &[WindowRange]) {
        let zero = |owner| heap.zeroes_lost(owner);
        while let Some(owner) = heap.space().lose(gone, zero) {
            arena::table().note_lost(owner, GRANULE as u64);
        }
    }

    /// The worker's part: what was lost is mapped no more, so its lender may
    /// have it. What was unused goes along.
    pub(super) fn let_go_of_lost(&self, heap: &Heap, source: &dyn ExtentSource) {
        loop {
            let Some(gone) = self.lost.lock().iter_mut().find_map(Option::take) else {
                return;
            };
            while let idle = heap.space().take_idle(usize::MAX, gone.as_slice(), 0)
                && !idle.is_empty()
            {}
            source.give_back(&gone);
            self.returned.fetch_add(gone.bytes(), Ordering::Relaxed);
        }
    }

    /// Loses the granules that threads met broken memory in. They stay lent:
    /// nobody else shall have them.
    pub(super) fn lose_broken(&self, heap: &Heap) {
        sigbus::each_broken(|addr| {
            if let Some(offset) = heap.space().extent_offset(addr) {
                let len = GRANULE as u64;
                self.lose_in_use(heap, &[WindowRange { offset, len }]);
            }
        });
    }
}
