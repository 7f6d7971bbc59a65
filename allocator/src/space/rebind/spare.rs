//! Backing that waits to be put in place.

use super::staging::{Staging, populate_live};
use super::{Memory, RUN, Step};
use rustix::io::Errno;
use rustix::mm::Advice;

/// From this many live pages on a granule in DRAM is one huge page; below,
/// only its live pages take memory. A huge page then costs at most 1.28 times
/// what is live.
const HUGE_FROM_PAGES: u32 = 400;

/// Backing for a run of granules, filled by its owner and put in place by
/// [`Mover::give`](super::Mover::give). What is not given is freed on drop.
#[derive(Debug)]
pub struct Spare {
    pub(super) staging: Staging,
    /// Where each granule is to be filled.
    fill: [usize; RUN],
}

impl Spare {
    /// Makes the memory that `steps` ask for, with its pages present. A granule
    /// of DRAM that is mostly live is a huge page where the system gives one;
    /// otherwise only its live pages take memory, and the rest reads as zeroes.
    ///
    /// # Errors
    /// `ENOMEM` (memory, address space, `vm.max_map_count`, overcommit),
    /// `EAGAIN` (`RLIMIT_MEMLOCK` under mlockall(2)), `EFAULT` and `EHWPOISON`
    /// (an extent that has gone); nothing is left behind.
    ///
    /// # Safety
    /// Every [`Memory::Extent`] names a granule of a shared mapping.
    pub unsafe fn prepare(steps: &[Step<'_>]) -> Result<Self, Errno> {
        let mut spare = Self {
            staging: Staging::EMPTY,
            fill: [0; RUN],
        };
        let mut i = 0;
        for same in steps.chunk_by(|a, b| (a.to == Memory::Dram) == (b.to == Memory::Dram)) {
            if same[0].to == Memory::Dram {
                // Adjacent, so that they are one mapping in place as well.
                spare.staging.reserve(i, same.len())?;
            }
            for step in same {
                // SAFETY: the caller's.
                spare.fill[i] = unsafe { spare.staging.back(i, step) }?;
                i += 1;
            }
        }
        Ok(spare)
    }

    /// Where granule `i`, which was not given yet, is to be filled.
    pub fn granule(&self, i: usize) -> *mut u8 {
        self.fill[i] as *mut u8
    }
}

impl Staging {
    /// Backs granule `i` with what `step` asks for; says where to fill it.
    ///
    /// # Safety
    /// As [`Spare::prepare`].
    unsafe fn back(&mut self, i: usize, step: &Step<'_>) -> Result<usize, Errno> {
        match step.to {
            Memory::Extent(alias) => {
                populate_live(alias, step.live, Advice::LinuxPopulateWrite)?;
                // SAFETY: the caller's.
                unsafe { self.map_extent(i, alias) }?;
                return Ok(alias);
            }
            Memory::Dram if step.live.count() < HUGE_FROM_PAGES => self.map_pages(i, step.live)?,
            Memory::Dram => self.map_huge(i)?,
        }
        Ok(self.granule(i))
    }
}
