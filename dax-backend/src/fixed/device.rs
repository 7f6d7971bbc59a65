//! What a broker sees of memory that is there already, and who adds to it and takes from it.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{FallocateFlags, fallocate};

use crate::address::{Dpa, DpaRange};
use crate::capacity::{CapacityDevice, DeviceCounters, DeviceEvent};
use crate::error::DeviceError;
use crate::extent::{Extent, ExtentTag};
use crate::orchestrator::{Orchestrator, OrchestratorError};

/// What can be taken out of use and put back: a granule.
const BLOCK: u64 = crate::broker::GRANULE;

/// What both sides know.
#[derive(Debug, Default)]
struct Shared {
    /// Out of use, in rising order, none touching.
    unused: Vec<DpaRange>,
    /// What the device has to say.
    events: Vec<DeviceEvent>,
    /// Put back, and not told yet.
    offered: Vec<Extent>,
}

/// Memory that is there already, as a device. Offsets into it are its DPAs.
#[derive(Debug)]
pub struct FixedDevice {
    len: u64,
    held: Vec<Extent>,
    counters: DeviceCounters,
    /// Whose pages go back to the system with what is released.
    file: Option<OwnedFd>,
    shared: Arc<Mutex<Shared>>,
}

/// Who takes of that memory out of use, and puts it back.
#[derive(Debug)]
pub struct FixedOrchestrator {
    shared: Arc<Mutex<Shared>>,
}

/// `len` bytes of memory, all in use; rounded down to granules.
pub fn fixed(len: u64) -> (FixedDevice, FixedOrchestrator) {
    let len = len - len % BLOCK;
    let shared = Arc::new(Mutex::new(Shared::default()));
    let whole = DpaRange { start: Dpa(0), len };
    let device = FixedDevice {
        len,
        held: vec![Extent::untagged(whole)],
        counters: DeviceCounters {
            extents_adopted: 1,
            ..DeviceCounters::default()
        },
        file: None,
        shared: Arc::clone(&shared),
    };
    (device, FixedOrchestrator { shared })
}

impl FixedDevice {
    /// Has the pages of `file`, which is a memfd, go back to the system when they are released.
    #[must_use]
    pub fn freeing(self, file: OwnedFd) -> Self {
        Self {
            file: Some(file),
            ..self
        }
    }
}

impl CapacityDevice for FixedDevice {
    fn poll(&mut self) -> Result<Vec<DeviceEvent>, DeviceError> {
        let mut shared = self.shared.lock();
        let mut events = std::mem::take(&mut shared.events);
        let extents = std::mem::take(&mut shared.offered);
        if !extents.is_empty() {
            self.counters.groups_answered += 1;
            self.counters.extents_accepted += extents.len() as u64;
            for extent in &extents {
                self.counters.bytes_accepted += extent.range.len;
            }
            self.held.extend_from_slice(&extents);
            self.held.sort_by_key(|extent| extent.range);
            events.push(DeviceEvent::Accepted { extents });
        }
        Ok(events)
    }

    fn release(&mut self, ranges: &[DpaRange]) -> Result<(), DeviceError> {
        for range in ranges {
            if !range.is_aligned(Dpa(0), BLOCK) {
                return Err(DeviceError::Misaligned {
                    range: *range,
                    block_size: BLOCK,
                });
            }
            let parts = self.held.iter().filter_map(|e| e.range.intersection(range));
            if range.is_empty() || parts.map(|part| part.len).sum::<u64>() != range.len {
                return Err(DeviceError::NotHeld { range: *range });
            }
        }
        for range in ranges {
            let pieces = self.held.iter().flat_map(|extent| {
                let pieces = extent.range.subtract(range).into_iter().flatten();
                pieces.map(Extent::untagged)
            });
            self.held = pieces.collect();
            self.counters.bytes_released += range.len;
            if let Some(file) = &self.file {
                let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(file, hole, range.start.0, range.len)
                    .expect("a memfd can have holes punched anywhere within its length");
            }
        }
        let mut shared = self.shared.lock();
        shared.unused.extend_from_slice(ranges);
        DpaRange::coalesce(&mut shared.unused);
        Ok(())
    }

    fn accepted(&self) -> &[Extent] {
        &self.held
    }

    fn dc_span(&self) -> DpaRange {
        DpaRange {
            start: Dpa(0),
            len: self.len,
        }
    }

    fn block_size(&self) -> u64 {
        BLOCK
    }

    fn sanitizes(&self, _range: &DpaRange) -> bool {
        false
    }

    fn counters(&self) -> DeviceCounters {
        self.counters
    }
}

impl Orchestrator for FixedOrchestrator {
    fn add(&mut self, sizes: &[u64], tag: ExtentTag) -> Result<Vec<Extent>, OrchestratorError> {
        let refused = |reason: &str| OrchestratorError::Refused {
            reason: reason.into(),
        };
        if !tag.is_null() {
            return Err(refused("memory that is there already has no tags"));
        }
        if sizes.is_empty() || sizes.iter().any(|size| *size == 0 || size % BLOCK != 0) {
            return Err(refused("sizes are multiples of 2 MiB, and not 0"));
        }
        let mut shared = self.shared.lock();
        let available = shared.unused.iter().map(|range| range.len).sum();
        let wanted = sizes.iter().fold(0, |sum: u64, &n| sum.saturating_add(n));
        if wanted > available {
            return Err(OrchestratorError::NoCapacity { wanted, available });
        }
        let mut extents = Vec::new();
        for &size in sizes {
            let mut rest = size;
            while rest > 0 {
                // Enough is there; in one piece if there is one that is long enough.
                let fitting = shared.unused.iter().position(|range| range.len >= rest);
                let from = &mut shared.unused[fitting.unwrap_or(0)];
                let len = rest.min(from.len);
                let start = from.start;
                from.start.0 += len;
                from.len -= len;
                shared.unused.retain(|range| !range.is_empty());
                extents.push(Extent::untagged(DpaRange { start, len }));
                rest -= len;
            }
        }
        shared.offered.extend_from_slice(&extents);
        Ok(extents)
    }

    fn release(&mut self, ranges: &[DpaRange], forced: bool) -> Result<(), OrchestratorError> {
        if forced {
            let reason = "memory that is there already does not go away: release it without force";
            return Err(OrchestratorError::Refused {
                reason: reason.into(),
            });
        }
        let asked = ranges.iter().map(|&range| DeviceEvent::ReleaseRequested {
            range,
            tag: ExtentTag::NULL,
        });
        self.shared.lock().events.extend(asked);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};

    fn range(start: u64, len: u64) -> DpaRange {
        DpaRange {
            start: Dpa(start * BLOCK),
            len: len * BLOCK,
        }
    }

    fn held(device: &FixedDevice) -> Vec<DpaRange> {
        device
            .accepted()
            .iter()
            .map(|extent| extent.range)
            .collect()
    }

    #[test]
    fn what_was_released_can_be_put_back() {
        let (mut device, mut operator) = fixed(8 * BLOCK + 4096);
        assert_eq!(held(&device), [range(0, 8)]);
        device.release(&[range(1, 2), range(6, 1)]).unwrap();
        assert_eq!(held(&device), [range(0, 1), range(3, 3), range(7, 1)]);
        let error = operator.add(&[4 * BLOCK], ExtentTag::NULL).unwrap_err();
        assert!(matches!(
            error,
            OrchestratorError::NoCapacity { available, .. } if available == 3 * BLOCK
        ));
        let extents = operator.add(&[3 * BLOCK], ExtentTag::NULL).unwrap();
        assert_eq!(extents.len(), 2, "in two pieces, if need be");
        let events = device.poll().unwrap();
        assert_eq!(events, [DeviceEvent::Accepted { extents }]);
        assert_eq!(held(&device).iter().map(|r| r.len).sum::<u64>(), 8 * BLOCK);
        assert_eq!(device.poll().unwrap(), []);
    }

    #[test]
    fn released_pages_go_back_to_the_system() {
        let file = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 4 * BLOCK).unwrap();
        fallocate(&file, FallocateFlags::empty(), 0, 4 * BLOCK).unwrap();
        let blocks = || fstat(&file).unwrap().st_blocks as u64 * 512;
        assert_eq!(blocks(), 4 * BLOCK);
        let (device, _operator) = fixed(4 * BLOCK);
        let mut device = device.freeing(file.try_clone().unwrap());
        device.release(&[range(1, 2)]).unwrap();
        assert_eq!(blocks(), 2 * BLOCK);
    }

    #[test]
    fn what_is_not_held_or_not_whole_is_refused_and_nothing_changes() {
        let (mut device, mut operator) = fixed(4 * BLOCK);
        let half = DpaRange {
            start: Dpa(0),
            len: BLOCK / 2,
        };
        let misaligned = device.release(&[half]);
        assert!(matches!(misaligned, Err(DeviceError::Misaligned { .. })));
        let beyond = device.release(&[range(0, 1), range(3, 2)]);
        assert!(matches!(beyond, Err(DeviceError::NotHeld { .. })));
        assert_eq!(held(&device), [range(0, 4)]);
        for sizes in [&[][..], &[0], &[BLOCK + 1]] {
            let refused = operator.add(sizes, ExtentTag::NULL);
            assert!(matches!(refused, Err(OrchestratorError::Refused { .. })));
        }
        let forced = operator.release(&[range(0, 1)], true);
        assert!(matches!(forced, Err(OrchestratorError::Refused { .. })));
    }

    #[test]
    fn the_operator_asks_and_the_device_says_so() {
        let (mut device, mut operator) = fixed(4 * BLOCK);
        operator.release(&[range(2, 1)], false).unwrap();
        let asked = DeviceEvent::ReleaseRequested {
            range: range(2, 1),
            tag: ExtentTag::NULL,
        };
        assert_eq!(device.poll().unwrap(), [asked]);
    }
}
