//! Whether a granule's mapping is still as it was made. A program may
//! mprotect(2), mlock(2) or pkey_mprotect(2) its heap; a rebind would undo
//! that silently, so such a granule stays where it is.
//!
//! Three questions, each as cheap as the kernel allows, on every move:
//! protection and kind by the `PROCMAP_QUERY` ioctl (Linux 6.11; a walk of
//! `/proc/self/smaps` before), locks by msync(2), and protection keys only if
//! pkey_alloc(2) shows that the program holds one, by smaps.
//!
//! What the program changes while its granule is in flight is lost.

use super::smaps::{self, Area};
use super::{GRANULE, PAGE};
use core::ffi::c_void;
use core::ops::Range;
use core::ptr::null_mut;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap_anonymous, msync, munmap};

// include/uapi/linux/fs.h
const PROCMAP_QUERY: Opcode = opcode::read_write::<QueryArg>(b'f', 17);
const VMA_READABLE: u64 = 0x01;
const VMA_WRITABLE: u64 = 0x02;
const VMA_EXECUTABLE: u64 = 0x04;
const VMA_SHARED: u64 = 0x08;

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct QueryArg {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const _: () = assert!(size_of::<QueryArg>() == 104);

/// What the program did to a granule's mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Change {
    /// Part of it is not mapped, or maps something else.
    #[error("it is unmapped, or something else is mapped there")]
    Replaced,
    /// mprotect(2).
    #[error("its protection was changed with mprotect")]
    Protection,
    /// mlock(2), other than by mlockall(2).
    #[error("it is locked with mlock")]
    Locked,
    /// pkey_mprotect(2).
    #[error("it has a protection key")]
    ProtectionKey,
}

/// The descriptors and the page that the questions need.
#[derive(Debug)]
pub(super) struct Mappings {
    maps: OwnedFd,
    smaps: OwnedFd,
    /// Whether the processor has protection keys at all.
    has_keys: bool,
    /// A page that only mlockall(2) can have locked.
    reference: usize,
    /// `vm.max_map_count`, if it can be read.
    most: Option<usize>,
}

impl Mappings {
    pub(super) fn open() -> Result<Self, Errno> {
        let file = |path| open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        Ok(Self {
            maps: file(c"/proc/self/maps")?,
            smaps: file(c"/proc/self/smaps")?,
            has_keys: next_key().is_some(),
            reference: map_page()?,
            most: max_map_count(),
        })
    }

    /// Whether `range` is readable, writable, and shared or private as a
    /// granule of its kind is. Errors are what the kernel refused to tell.
    pub(super) fn changed(
        &self,
        range: Range<usize>,
        shared: bool,
    ) -> Result<Option<Change>, Errno> {
        let mut at = range.start;
        while at < range.end {
            let Some(area) = self.area(at)? else {
                return Ok(Some(Change::Replaced));
            };
            if area.shared != shared {
                return Ok(Some(Change::Replaced));
            }
            if !area.readable || !area.writable || area.executable {
                return Ok(Some(Change::Protection));
            }
            at = area.range.end;
        }
        if self.is_locked_by_hand(&range)? {
            return Ok(Some(Change::Locked));
        }
        if self.has_keys && next_key() != Some(1) {
            let mut keyed = false;
            self.each_smap(|area| {
                let overlaps = area.range.start < range.end && range.start < area.range.end;
                keyed |= overlaps && area.key != 0;
            })?;
            return Ok(keyed.then_some(Change::ProtectionKey));
        }
        Ok(None)
    }

    /// How many more mappings the process may have; `usize::MAX` where that
    /// can't be told. Reads all of `/proc/self/maps`.
    pub(super) fn room(&self) -> usize {
        let mut lines = 0;
        let mut buffer = [0u8; 4096];
        let mut offset = 0;
        loop {
            match rustix::io::pread(&self.maps, &mut buffer, offset) {
                Ok(0) => break,
                Ok(n) => {
                    lines += buffer[..n].iter().filter(|byte| **byte == b'\n').count();
                    offset += n as u64;
                }
                Err(Errno::INTR) => {}
                Err(_) => return usize::MAX,
            }
        }
        self.most
            .map_or(usize::MAX, |most| most.saturating_sub(lines))
    }

    /// The end of the mapping that holds `at`, in whole granules, or of the
    /// range `at` starts if that is nearer.
    pub(super) fn end_of(&self, at: usize, limit: usize) -> Result<usize, Errno> {
        let end = self.area(at)?.map_or(at, |area| area.range.end);
        let whole = end - (end - at) % GRANULE;
        Ok(whole.clamp(at + GRANULE, limit))
    }

    fn area(&self, at: usize) -> Result<Option<Area>, Errno> {
        let mut query = QueryArg {
            size: size_of::<QueryArg>() as u64,
            query_addr: at as u64,
            ..QueryArg::default()
        };
        // SAFETY: PROCMAP_QUERY reads and writes a `struct procmap_query`.
        match unsafe { ioctl(&self.maps, Updater::<PROCMAP_QUERY, _>::new(&mut query)) } {
            Ok(()) => Ok(Some(Area {
                range: query.vma_start as usize..query.vma_end as usize,
                readable: query.vma_flags & VMA_READABLE != 0,
                writable: query.vma_flags & VMA_WRITABLE != 0,
                executable: query.vma_flags & VMA_EXECUTABLE != 0,
                shared: query.vma_flags & VMA_SHARED != 0,
                key: 0,
            })),
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTTY) => self.walk_to(at),
            Err(errno) => Err(errno),
        }
    }

    fn walk_to(&self, at: usize) -> Result<Option<Area>, Errno> {
        let mut found = None;
        self.each_smap(|area| {
            if area.range.contains(&at) {
                found = Some(area);
            }
        })?;
        Ok(found)
    }

    fn each_smap(&self, each: impl FnMut(Area)) -> Result<(), Errno> {
        let mut offset = 0;
        let read = |buffer: &mut [u8]| {
            let n = rustix::io::pread(&self.smaps, buffer, offset)?;
            offset += n as u64;
            Ok(n)
        };
        smaps::each_area(read, each)
    }

    /// Whether the program locked the range itself. mlockall(2) locks also
    /// the reference page, or every new page, and is no reason to refuse.
    fn is_locked_by_hand(&self, range: &Range<usize>) -> Result<bool, Errno> {
        if !is_locked(range.start, range.len())? || is_locked(self.reference, PAGE)? {
            return Ok(false);
        }
        let newborn = map_page()?;
        let locks_all = is_locked(newborn, PAGE);
        // SAFETY: the page was mapped above and nothing refers to it.
        let _ = unsafe { munmap(newborn as *mut c_void, PAGE) };
        locks_all.map(|all| !all)
    }
}

/// msync(2) fails with `EBUSY` on a locked mapping when asked to invalidate;
/// asynchronously it does nothing else, on any kind of mapping.
fn is_locked(at: usize, len: usize) -> Result<bool, Errno> {
    let ask = MsyncFlags::ASYNC | MsyncFlags::INVALIDATE;
    // SAFETY: changes nothing, wherever it points.
    match unsafe { msync(at as *mut c_void, len, ask) } {
        Ok(()) => Ok(false),
        Err(Errno::BUSY) => Ok(true),
        Err(errno) => Err(errno),
    }
}

/// The protection key that the kernel would hand out next: the lowest free
/// one. `None` without hardware or when all are taken.
fn next_key() -> Option<i64> {
    // SAFETY: allocates a key, which no mapping has, and frees it.
    unsafe {
        let key = libc::syscall(libc::SYS_pkey_alloc, 0, 0);
        (key >= 0 && libc::syscall(libc::SYS_pkey_free, key) == 0).then_some(key)
    }
}

fn max_map_count() -> Option<usize> {
    let file = open(
        c"/proc/sys/vm/max_map_count",
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    );
    let mut text = [0u8; 32];
    let n = rustix::io::read(file.ok()?, &mut text).ok()?;
    core::str::from_utf8(&text[..n]).ok()?.trim().parse().ok()
}

fn map_page() -> Result<usize, Errno> {
    let flags = MapFlags::PRIVATE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let page = unsafe { mmap_anonymous(null_mut(), PAGE, ProtFlags::empty(), flags) }?;
    Ok(page as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mm::{MlockAllFlags, MprotectFlags, mlock, mlockall, mprotect, munlockall};

    fn anonymous(len: usize) -> usize {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping.
        unsafe { mmap_anonymous(null_mut(), len, access, MapFlags::PRIVATE) }.unwrap() as usize
    }

    #[test]
    fn what_a_program_does_to_a_mapping_is_seen() {
        let mappings = Mappings::open().unwrap();
        let len = 16 * PAGE;
        let changed = |at| mappings.changed(at..at + len, false).unwrap();
        let at = anonymous(len);
        assert_eq!(changed(at), None);
        assert_eq!(
            mappings.changed(at..at + len, true),
            Ok(Some(Change::Replaced))
        );
        let middle = (at + 8 * PAGE) as *mut c_void;

        // SAFETY: the mapping is this test's.
        unsafe { mprotect(middle, PAGE, MprotectFlags::READ) }.unwrap();
        assert_eq!(changed(at), Some(Change::Protection));

        let at = anonymous(len);
        // SAFETY: as above.
        unsafe { mlock((at + PAGE) as *mut c_void, PAGE) }.unwrap();
        assert_eq!(changed(at), Some(Change::Locked));

        let at = anonymous(len);
        // SAFETY: as above.
        unsafe { munmap((at + PAGE) as *mut c_void, PAGE) }.unwrap();
        assert_eq!(changed(at), Some(Change::Replaced));

        // What locks everything is not aimed at a granule.
        for flags in [MlockAllFlags::FUTURE, MlockAllFlags::CURRENT] {
            mlockall(flags).unwrap();
            let at = anonymous(len);
            let seen = changed(at);
            munlockall().unwrap();
            assert_eq!(seen, None, "{flags:?}");
        }
    }

    #[test]
    fn smaps_tells_the_same_as_the_query() {
        let mappings = Mappings::open().unwrap();
        let at = anonymous(16 * PAGE);
        let queried = mappings.area(at + PAGE).unwrap().unwrap();
        let walked = mappings.walk_to(at + PAGE).unwrap().unwrap();
        assert_eq!(queried, walked);
    }
}
