//! What a device took by force: the program is told, and lives or not, as it
//! has said; what lay there is mapped no more and goes back to its lender.
#![forbid(unsafe_code)]

use core::sync::atomic::Ordering;
use core::time::Duration;

use super::Service;
use crate::heap::Heap;
use crate::source::{ExtentSource, Ranges, WindowRange};

impl Service {
    /// On the thread that hears, since the worker may be at work for seconds.
    pub(super) fn lose(&self, heap: &Heap, source: &dyn ExtentSource, gone: &Ranges) {
        if gone.is_empty() {
            return;
        }
        self.let_go(heap, source, gone.as_slice());
        // What is on its way to these extents arrives there yet.
        while !self.note_landing(gone) {
            std::thread::sleep(Duration::from_millis(1));
        }
        heap.wanted().raise();
    }

    /// The same for what has arrived since; to be called while nothing moves.
    pub(crate) fn lose_landed(&self, heap: &Heap, source: &dyn ExtentSource) {
        loop {
            let Some(gone) = self.landing.lock().iter_mut().find_map(Option::take) else {
                return;
            };
            self.let_go(heap, source, gone.as_slice());
        }
    }

    fn note_landing(&self, gone: &Ranges) -> bool {
        let mut landing = self.landing.lock();
        let free = landing.iter_mut().find(|place| place.is_none());
        free.map(|place| *place = Some(*gone)).is_some()
    }

    /// Gives back extents that are gone, whatever was on them.
    fn let_go(&self, heap: &Heap, source: &dyn ExtentSource, gone: &[WindowRange]) {
        loop {
            // First, so that nothing more is handed out there.
            let idle = heap.space().take_idle(usize::MAX, gone, 0);
            let used = heap.lose(gone);
            for ranges in [idle, used] {
                if !ranges.is_empty() {
                    self.returned.fetch_add(ranges.bytes(), Ordering::Relaxed);
                    source.give_back(&ranges);
                }
            }
            if idle.is_empty() && used.is_empty() {
                return;
            }
        }
    }
}
