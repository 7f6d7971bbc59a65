//! A run of granules at an address that nobody else knows, where everything
//! that can fail is done before a granule of the heap is touched.

use super::{GRANULE, LivePages, Memory, PAGE, RUN, Step};
use core::ffi::c_void;
use core::ptr::null_mut;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use rustix::mm::{madvise, mmap_anonymous, mprotect, mremap_fixed, munmap};

/// From this many live pages on a granule in DRAM is one huge page; below,
/// only its live pages take memory. A huge page then costs at most 1.28 times
/// what is live.
const HUGE_FROM_PAGES: u32 = 400;

/// Addresses for up to [`RUN`] granules, aligned. A granule that was moved
/// out leaves a hole that any thread's mmap(2) may take, so each is counted.
#[derive(Debug)]
pub(super) struct Staging {
    at: usize,
    /// A bit per granule that is still here.
    here: u32,
}

impl Staging {
    pub(super) const NONE: Self = Self { at: 0, here: 0 };

    /// `n` granules of addresses without access.
    pub(super) fn reserve(n: usize) -> Result<Self, Errno> {
        debug_assert!(0 < n && n <= RUN);
        let len = n * GRANULE;
        let mut at = map_nothing(len)?;
        // Linux 6.7 and newer align a mapping of this size by themselves.
        if !at.is_multiple_of(GRANULE) {
            unmap(at, len);
            let wide = map_nothing(len + GRANULE)?;
            at = wide.next_multiple_of(GRANULE);
            unmap(wide, at - wide);
            unmap(at + len, wide + GRANULE - at);
        }
        Ok(Self {
            at,
            here: (1 << n) - 1,
        })
    }

    /// The address of granule `i`, which is still here.
    pub(super) fn granule(&self, i: usize) -> usize {
        debug_assert!(self.here & (1 << i) != 0);
        self.at + i * GRANULE
    }

    /// Puts `n` granules from the `i`th on at `va`, in place of what is
    /// mapped there, in one step. mremap(2) checks its limits before it
    /// changes anything and needs no more address space than there is: it
    /// fails for lack of a mapping (`vm.max_map_count`) or of kernel memory.
    ///
    /// # Safety
    /// `va` and what is mapped there are the caller's to replace.
    pub(super) unsafe fn move_to(&mut self, i: usize, n: usize, va: usize) -> Result<(), Errno> {
        let (from, len) = (self.granule(i), n * GRANULE);
        // SAFETY: the source is ours, the caller vouches for the target.
        unsafe { remap(from, len, len, MremapFlags::empty(), va) }?;
        self.forget(i, n);
        Ok(())
    }

    /// Takes `n` granules from `va` here as granule `i` and following; `va`
    /// stays mapped, with no pages.
    ///
    /// # Safety
    /// As [`move_to`](Self::move_to); what is at `va` is anonymous memory in
    /// one mapping.
    pub(super) unsafe fn take_from(&mut self, i: usize, n: usize, va: usize) -> Result<(), Errno> {
        let (to, len) = (self.granule(i), n * GRANULE);
        // SAFETY: the target is ours, the caller vouches for the source.
        let done = unsafe { remap(va, len, len, MremapFlags::DONTUNMAP, to) };
        if done.is_err() {
            self.forget(i, n);
        }
        done
    }

    /// The granule of an extent at `alias`, mapped once more.
    ///
    /// # Safety
    /// `alias` is a granule of a shared mapping.
    pub(super) unsafe fn of_extent(alias: usize) -> Result<Self, Errno> {
        let mut staging = Self::reserve(1)?;
        // SAFETY: the caller's.
        unsafe { staging.map_extent(0, alias) }?;
        Ok(staging)
    }

    /// Maps the granule of an extent at `alias` once more, as granule `i`.
    ///
    /// # Safety
    /// As [`of_extent`](Self::of_extent).
    unsafe fn map_extent(&mut self, i: usize, alias: usize) -> Result<(), Errno> {
        self.duplicate(i, alias)?;
        let at = self.granule(i);
        // A mapping that a child inherited would let it write into its
        // parent's heap.
        advise(at, GRANULE, Advice::LinuxDontFork)?;
        advise(at, GRANULE, Advice::LinuxDontDump)?;
        populate(at, GRANULE);
        Ok(())
    }

    /// Makes granule `i` anonymous memory, a huge page if there is one.
    fn map_huge(&mut self, i: usize) -> Result<(), Errno> {
        let at = self.granule(i);
        // A kernel without huge pages refuses the advice.
        let _ = advise(at, GRANULE, Advice::LinuxHugepage);
        allow_access(at, GRANULE)?;
        // The kernel clears a huge page towards the address that faults, and
        // upwards takes it less than half the time that downwards does.
        populate(at + GRANULE - PAGE, PAGE);
        populate(at, GRANULE);
        Ok(())
    }

    /// Makes granule `i` anonymous memory with the live pages present.
    fn map_pages(&mut self, i: usize, live: &LivePages) -> Result<(), Errno> {
        let at = self.granule(i);
        // Before it is accessible, since mlockall(MCL_FUTURE) populates then.
        let _ = advise(at, GRANULE, Advice::LinuxNoHugepage);
        allow_access(at, GRANULE)?;
        for pages in live.runs() {
            populate(at + pages.start * PAGE, pages.len() * PAGE);
        }
        Ok(())
    }

    fn duplicate(&mut self, i: usize, alias: usize) -> Result<(), Errno> {
        let to = self.granule(i);
        // SAFETY: an old size of 0 leaves the source as it is; the target is
        // ours.
        let done = unsafe { remap(alias, 0, GRANULE, MremapFlags::empty(), to) };
        if done.is_err() {
            self.forget(i, 1);
        }
        done
    }

    /// A failed mremap(2) may have unmapped its target, which another thread
    /// may have mapped since: better to lose the addresses.
    fn forget(&mut self, i: usize, n: usize) {
        self.here &= !(((1 << n) - 1) << i);
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for i in (0..RUN).filter(|i| self.here & (1 << i) != 0) {
            unmap(self.at + i * GRANULE, GRANULE);
        }
    }
}

/// Backing for a run of granules, filled by its owner and put in place by
/// [`Mover::give`](super::Mover::give). What is not given is freed on drop.
#[derive(Debug)]
pub struct Spare {
    pub(super) staging: Staging,
}

impl Spare {
    /// Makes the memory that `steps` ask for, with its pages present. A granule
    /// of DRAM that is mostly live is a huge page where the system gives one;
    /// otherwise only its live pages take memory, and the rest reads as zeroes.
    ///
    /// # Errors
    /// `ENOMEM` (address space, `vm.max_map_count`, overcommit), `EAGAIN`
    /// (`RLIMIT_MEMLOCK` under mlockall(2)); nothing is left behind.
    ///
    /// # Safety
    /// Every [`Memory::Extent`] names a granule of a shared mapping.
    pub unsafe fn prepare(steps: &[Step<'_>]) -> Result<Self, Errno> {
        let mut staging = Staging::reserve(steps.len())?;
        for (i, step) in steps.iter().enumerate() {
            match step.to {
                // SAFETY: the caller's.
                Memory::Extent(alias) => unsafe { staging.map_extent(i, alias) }?,
                Memory::Dram if step.live.count() < HUGE_FROM_PAGES => {
                    staging.map_pages(i, step.live)?;
                }
                Memory::Dram => staging.map_huge(i)?,
            }
        }
        Ok(Self { staging })
    }

    /// The memory of granule `i`, which was not given yet.
    pub fn granule(&self, i: usize) -> *mut u8 {
        self.staging.granule(i) as *mut u8
    }
}

/// Faults pages in now, so that the copy does not. What cannot be populated
/// ahead (an old kernel, `/dev/mem`) is faulted in later.
fn populate(at: usize, len: usize) {
    let _ = advise(at, len, Advice::LinuxPopulateWrite);
}

pub(super) fn advise(at: usize, len: usize, advice: Advice) -> Result<(), Errno> {
    // SAFETY: the callers pass mappings of this module, and advice that drops
    // no content.
    unsafe { madvise(at as *mut c_void, len, advice) }
}

pub(super) fn allow_access(at: usize, len: usize) -> Result<(), Errno> {
    let access = MprotectFlags::READ | MprotectFlags::WRITE;
    // SAFETY: the callers pass mappings of this module.
    unsafe { mprotect(at as *mut c_void, len, access) }
}

fn map_nothing(len: usize) -> Result<usize, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { mmap_anonymous(null_mut(), len, ProtFlags::empty(), flags) }?;
    Ok(at as usize)
}

fn unmap(at: usize, len: usize) {
    if len > 0 {
        // SAFETY: the callers pass mappings of this module that nothing else
        // refers to.
        let _ = unsafe { munmap(at as *mut c_void, len) };
    }
}

/// mremap(2) to a fixed address.
///
/// # Safety
/// Source and target are the caller's to change.
unsafe fn remap(
    from: usize,
    old_len: usize,
    len: usize,
    flags: MremapFlags,
    to: usize,
) -> Result<(), Errno> {
    let flags = flags | MremapFlags::MAYMOVE;
    // SAFETY: the caller's.
    unsafe { mremap_fixed(from as *mut c_void, old_len, len, flags, to as *mut c_void) }.map(drop)
}
