//! The system calls that change what is behind a granule's addresses
//! (mmap(2), mremap(2), madvise(2)). No other file of this crate maps memory
//! for granules. All are raw: they neither allocate nor touch `errno`.

use super::present;
use core::ffi::c_void;
use core::ptr::null_mut;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags};
use rustix::mm::{madvise, mmap, mmap_anonymous, mremap_fixed, munmap};

/// Reserves `len` bytes of addresses aligned to `align`; nothing may touch
/// them until a granule is backed.
pub(super) fn reserve(len: usize, align: usize) -> Result<usize, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let raw =
        unsafe { mmap_anonymous(null_mut(), len + align, ProtFlags::empty(), flags) }? as usize;
    let start = raw.next_multiple_of(align);
    trim(raw, start);
    trim(start + len, raw + len + align);
    Ok(start)
}

fn trim(from: usize, to: usize) {
    if to > from {
        // SAFETY: `reserve` just made this mapping and hands out none of it.
        let _ = unsafe { munmap(from as *mut c_void, to - from) };
    }
}

/// Zeroed memory of the allocator's own, for tables; never freed.
pub(crate) fn table(len: usize) -> Result<usize, Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let table =
        unsafe { mmap_anonymous(null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
    Ok(table as usize)
}

/// Backs `len` bytes at `at` with anonymous DRAM, which reads as zeroes. It
/// counts as memory in use, so that a request for more than the machine has
/// is refused by the kernel and not by its OOM killer.
///
/// # Safety
/// `at..at + len` lies in a reservation of this module and holds nothing that
/// anyone still needs.
pub(super) unsafe fn back_with_dram(at: usize, len: usize) -> Result<(), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the caller owns these addresses.
    unsafe { mmap_anonymous(at as *mut c_void, len, prot, flags) }.map(drop)
}

/// Backs `len` bytes at `at` with the part of the window that starts at
/// address `alias`. A shared mapping moved with an old size of 0 is
/// duplicated, so this needs no descriptor: a program that closed them all
/// still gets its granules.
///
/// # Safety
/// As [`back_with_dram`]; `alias..alias + len` lies in the window's mapping.
pub(super) unsafe fn back_with_window(at: usize, alias: usize, len: usize) -> Result<(), Errno> {
    let flags = MremapFlags::MAYMOVE;
    // SAFETY: the caller owns the target addresses, and an old size of 0
    // leaves the source mapping as it is.
    unsafe { mremap_fixed(alias as *mut c_void, 0, len, flags, at as *mut c_void) }.map(drop)
}

/// The same with pages of an extent, which are there when this returns if the window is a device.
///
/// # Safety
/// As [`back_with_window`].
pub(super) unsafe fn back_with_extent(at: usize, alias: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: the caller's.
    unsafe { back_with_window(at, alias, len) }?;
    if !present::is_needed() {
        return Ok(());
    }
    let populate = || {
        // SAFETY: advice that changes no content, on what was just mapped.
        unsafe { madvise(at as *mut c_void, len, Advice::LinuxPopulateWrite) }
    };
    present::populate(populate).inspect_err(|_| {
        // SAFETY: the caller owns these addresses, and nothing is in them yet.
        let _ = unsafe { unback(at, len) };
    })
}

/// A shared mapping of `len` bytes that whoever touches gets SIGBUS for, and the
/// kernel EFAULT: its file ends before it (mmap(2)). For [`back_with_window`].
pub(super) fn dead(len: usize) -> Result<usize, Errno> {
    let empty = memfd_create(c"dcmalloc-lost", MemfdFlags::CLOEXEC)?;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    unsafe { mmap(null_mut(), len, prot, MapFlags::SHARED, empty, 0) }.map(|at| at as usize)
}

/// Makes `len` bytes at `at` a bare reservation again, whatever was there.
///
/// # Safety
/// As [`back_with_dram`].
pub(super) unsafe fn unback(at: usize, len: usize) -> Result<(), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the caller owns these addresses.
    unsafe { mmap_anonymous(at as *mut c_void, len, ProtFlags::empty(), flags) }.map(drop)
}

/// Drops the pages of anonymous memory; it reads as zeroes afterwards.
///
/// # Safety
/// The range is DRAM-backed and nobody needs its content.
pub(super) unsafe fn drop_pages(at: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: the caller owns these addresses and their content is dead.
    unsafe { madvise(at as *mut c_void, len, Advice::LinuxDontNeed) }
}

/// Keeps a mapping out of children and core files (see `MADV_DONTFORK` in
/// madvise(2)): a child that wrote to a shared extent would write into its
/// parent's heap.
///
/// # Safety
/// The range is mapped and belongs to the caller.
pub unsafe fn keep_private(at: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: advice that changes no content.
    unsafe { madvise(at as *mut c_void, len, Advice::LinuxDontFork) }?;
    // SAFETY: as above.
    unsafe { madvise(at as *mut c_void, len, Advice::LinuxDontDump) }
}
