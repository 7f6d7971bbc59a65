//! Granules at addresses that nobody else knows, where everything that can
//! fail is done before a granule of the heap is touched.
//!
//! The kernel chooses the addresses. Moving to chosen ones would, where
//! mremap(2) fails midway, leave a hole that another thread's mmap(2) may have
//! filled by the time it is given up.

use super::{GRANULE, LivePages, PAGE, RUN};
use crate::space::present;
use core::ffi::c_void;
use core::ptr::null_mut;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};
use rustix::mm::{madvise, mmap_anonymous, mprotect, mremap, mremap_fixed, munmap};

/// Up to [`RUN`] granules. Those that are mapped here are unmapped on drop;
/// the others are addresses in an alias mapping.
#[derive(Debug)]
pub(super) struct Staging {
    at: [usize; RUN],
    /// A bit per granule that is mapped here.
    ours: u32,
}

impl Staging {
    pub(super) const EMPTY: Self = Self {
        at: [0; RUN],
        ours: 0,
    };

    /// Granule `i` is at `alias`, and not mapped here.
    pub(super) fn refer(&mut self, i: usize, alias: usize) {
        self.at[i] = alias;
    }

    pub(super) fn is_ours(&self, i: usize) -> bool {
        self.ours & (1 << i) != 0
    }

    /// Maps `n` adjacent granules without access, from the `i`th on.
    pub(super) fn reserve(&mut self, i: usize, n: usize) -> Result<(), Errno> {
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
        self.put(i, n, at);
        Ok(())
    }

    /// The address of granule `i`.
    pub(super) fn granule(&self, i: usize) -> usize {
        self.at[i]
    }

    /// Moves `n` adjacent granules from the `i`th on to `va`, in place of what
    /// is mapped there, in one step. mremap(2) checks its limits before it
    /// changes anything, and needs no more address space than there is: it
    /// fails for lack of mappings (`vm.max_map_count`) or of kernel memory.
    ///
    /// # Safety
    /// What is mapped at `va` is the caller's to replace.
    pub(super) unsafe fn move_to(&mut self, i: usize, n: usize, va: usize) -> Result<(), Errno> {
        let (from, len) = (self.granule(i) as *mut c_void, n * GRANULE);
        // SAFETY: the source is ours, the caller vouches for the target.
        unsafe { mremap_fixed(from, len, len, MremapFlags::MAYMOVE, va as *mut c_void) }?;
        (i..i + n).for_each(|i| self.ours &= !(1 << i));
        Ok(())
    }

    /// Takes the pages of `n` granules at `va` here as granule `i` and
    /// following; `va` stays mapped, with no pages.
    ///
    /// # Safety
    /// What is at `va` is anonymous memory in one mapping, and the caller's.
    pub(super) unsafe fn take_from(&mut self, i: usize, n: usize, va: usize) -> Result<(), Errno> {
        let (va, len) = (va as *mut c_void, n * GRANULE);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
        // With this flag the kernel reads a fifth argument, a hint, which
        // rustix does not pass.
        // SAFETY: the caller's.
        let at = unsafe { libc::mremap(va, len, len, flags, null_mut::<c_void>()) };
        if at == libc::MAP_FAILED {
            return Err(last_error());
        }
        self.put(i, n, at as usize);
        Ok(())
    }

    /// Maps the granule of an extent at `alias` once more, as granule `i`.
    ///
    /// # Safety
    /// `alias` is a granule of a shared mapping.
    pub(super) unsafe fn map_extent(&mut self, i: usize, alias: usize) -> Result<(), Errno> {
        let alias = alias as *mut c_void;
        // SAFETY: a shared mapping with an old size of 0 is duplicated, and
        // stays as it is.
        let at = unsafe { mremap(alias, 0, GRANULE, MremapFlags::MAYMOVE) }? as usize;
        self.put(i, 1, at);
        // A child that inherited it would write into its parent's heap.
        advise(at, GRANULE, Advice::LinuxDontFork)?;
        advise(at, GRANULE, Advice::LinuxDontDump)?;
        make_present(at, GRANULE)
    }

    /// Makes reserved granule `i` anonymous memory, a huge page if there is
    /// one.
    pub(super) fn map_huge(&mut self, i: usize) -> Result<(), Errno> {
        let at = self.granule(i);
        // A kernel without huge pages refuses the advice.
        let _ = advise(at, GRANULE, Advice::LinuxHugepage);
        allow_access(at, GRANULE)?;
        // The kernel clears a huge page towards the address that faults, and
        // upwards takes it less than half the time that downwards does.
        populate(at + GRANULE - PAGE, PAGE, Advice::LinuxPopulateWrite)?;
        populate(at, GRANULE, Advice::LinuxPopulateWrite)
    }

    /// Makes reserved granule `i` anonymous memory with just the live pages
    /// present.
    pub(super) fn map_pages(&mut self, i: usize, live: &LivePages) -> Result<(), Errno> {
        let at = self.granule(i);
        // Before it is accessible, since mlockall(MCL_FUTURE) populates then.
        let _ = advise(at, GRANULE, Advice::LinuxNoHugepage);
        allow_access(at, GRANULE)?;
        populate_live(at, live, Advice::LinuxPopulateWrite)
    }

    fn put(&mut self, i: usize, n: usize, at: usize) {
        for k in 0..n {
            self.at[i + k] = at + k * GRANULE;
            self.ours |= 1 << (i + k);
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for i in (0..RUN).filter(|&i| self.is_ours(i)) {
            unmap(self.at[i], GRANULE);
        }
    }
}

/// Faults the live pages of a granule in now, for a copy that neither waits
/// for memory nor meets a page that cannot be had: here that is an error, and
/// there SIGBUS or the OOM killer.
pub(super) fn populate_live(at: usize, live: &LivePages, how: Advice) -> Result<(), Errno> {
    live.runs()
        .try_for_each(|pages| populate(at + pages.start * PAGE, pages.len() * PAGE, how))
}

/// Makes the pages of a new mapping of extents present where whoever touches
/// them could not.
pub(super) fn make_present(at: usize, len: usize) -> Result<(), Errno> {
    match present::is_needed() {
        true => populate(at, len, Advice::LinuxPopulateWrite),
        false => Ok(()),
    }
}

fn populate(at: usize, len: usize, how: Advice) -> Result<(), Errno> {
    present::populate(|| advise(at, len, how))
}

/// `errno` after a call of libc's that failed.
pub(super) fn last_error() -> Errno {
    let code = std::io::Error::last_os_error().raw_os_error();
    Errno::from_raw_os_error(code.unwrap_or(0))
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

pub(super) fn map_nothing(len: usize) -> Result<usize, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe { mmap_anonymous(null_mut(), len, ProtFlags::empty(), flags) }?;
    Ok(at as usize)
}

pub(super) fn unmap(at: usize, len: usize) {
    if len > 0 {
        // SAFETY: the callers pass mappings of this module that nothing else
        // refers to.
        let _ = unsafe { munmap(at as *mut c_void, len) };
    }
}
