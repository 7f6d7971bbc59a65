//! The client page: one shared page per client that says two things.
//!
//! *Liveness.* The broker creates it as a memfd, the client maps it shared and
//! writable and keeps no descriptor. Adding `F_SEAL_WRITE` (fcntl(2)) fails
//! with `EBUSY` as long as any process maps it so, and success is therefore
//! the proof that the last holder of the lease is gone, whatever closed, forked
//! or killed whatever. The broker itself must never map it.
//!
//! *Statistics.* The client counts into it with relaxed atomics, the broker
//! reads it with `pread`: status costs no message, and what a killed process
//! had counted is still there.

use std::ops::Deref;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// Bytes of a client page.
pub const PAGE_SIZE: usize = 4096;
/// Layout version, in the first field.
pub const PAGE_VERSION: u64 = 1;

/// [`ClientPage::degraded_flags`]: allocations fell to DRAM because extents ran out.
pub const DEGRADED_EXHAUSTED: u64 = 1 << 0;
/// [`ClientPage::degraded_flags`]: no userfaultfd, so live memory can't be moved.
pub const DEGRADED_NO_REBIND: u64 = 1 << 1;
/// [`ClientPage::degraded_flags`]: the connection to the broker was lost.
pub const DEGRADED_DISCONNECTED: u64 = 1 << 2;
// Bit 3 is free.
/// [`ClientPage::degraded_flags`]: the configuration had keys or values that were ignored.
pub const DEGRADED_CONFIG: u64 = 1 << 4;
/// [`ClientPage::degraded_flags`]: no file can be made in `spill_dir`.
pub const DEGRADED_NO_SPILL: u64 = 1 << 5;
/// [`ClientPage::degraded_flags`]: io_uring is denied, and granules are spilled one write at a time.
pub const DEGRADED_NO_RING: u64 = 1 << 6;
/// [`ClientPage::degraded_flags`]: live memory moves, and system calls that meet it fail.
pub const DEGRADED_USER_MOVES: u64 = 1 << 7;
/// [`ClientPage::degraded_flags`]: blocks of another allocator were to be freed, and were left alone.
pub const DEGRADED_FOREIGN: u64 = 1 << 8;

/// Buckets of [`ClientPage::stalls`].
pub const STALL_BUCKETS: usize = 24;
/// The first bucket of [`ClientPage::stalls`] ends before 2 to the power of this, in ns.
pub const STALL_FIRST_POWER: u32 = 11;

macro_rules! client_page {
    ($($(#[doc = $doc:literal])+ $field:ident,)+) => {
        /// The page as the client maps it: counters, 8 bytes each, in this order.
        #[repr(C)]
        pub struct ClientPage {
            $($(#[doc = $doc])+ pub $field: AtomicU64,)+
            /// How often a thread waited for a granule that moved, by the
            /// time it waited: below 2 µs, below 4 µs, and so on by powers of
            /// two ([`STALL_FIRST_POWER`]); the last bucket has no end.
            pub stalls: [AtomicU64; STALL_BUCKETS],
        }

        /// What a [`ClientPage`] said at one moment.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub struct ClientStats {
            $($(#[doc = $doc])+ pub $field: u64,)+
            /// Waits for granules that moved, by their length (see [`ClientPage::stalls`]).
            #[serde(default)]
            pub stalls: [u64; STALL_BUCKETS],
        }

        impl ClientPage {
            /// Copies the counters out, one by one (not as one atomic snapshot).
            pub fn snapshot(&self) -> ClientStats {
                ClientStats {
                    $($field: self.$field.load(Ordering::Relaxed),)+
                    stalls: self.stalls.each_ref().map(|bucket| bucket.load(Ordering::Relaxed)),
                }
            }
        }

        impl ClientStats {
            /// Reads the counters from the bytes of a page; fields that a short read misses are 0.
            pub fn from_bytes(bytes: &[u8]) -> Self {
                let (words, _) = bytes.as_chunks::<8>();
                let mut words = words.iter().map(|word| u64::from_ne_bytes(*word));
                let mut next = || words.next().unwrap_or(0);
                Self { $($field: next(),)+ stalls: std::array::from_fn(|_| next()) }
            }
        }
    };
}

client_page! {
    /// [`PAGE_VERSION`], written by the broker.
    version,
    /// Process id of the client, as it sees itself.
    pid,
    /// Incremented by the client when it starts anew on the same page (after fork).
    generation,
    /// Bytes of live objects on extents.
    extent_live_bytes,
    /// Bytes of granules backed by extents.
    extent_held_bytes,
    /// Bytes of live objects in DRAM.
    dram_live_bytes,
    /// Bytes of granules backed by DRAM.
    dram_granule_bytes,
    /// Highest `extent_live_bytes`.
    extent_live_peak,
    /// Highest `extent_held_bytes`.
    extent_held_peak,
    /// Highest `dram_live_bytes`.
    dram_live_peak,
    /// Highest `dram_granule_bytes`.
    dram_granule_peak,
    /// Granules backed by extents.
    granules_extent,
    /// Granules backed by DRAM.
    granules_dram,
    /// Grants received.
    grants,
    /// Ranges returned.
    returns,
    /// Recalls received.
    recalls,
    /// Bytes that recalls asked for.
    recall_bytes_asked,
    /// Bytes returned on recalls.
    recall_bytes_returned,
    /// Bytes refused on recalls.
    recall_bytes_refused,
    /// Granules moved from extents to DRAM or other extents.
    evacuated_granules,
    /// Granules moved from DRAM to extents.
    promoted_granules,
    /// Granules of which the content is in a file now.
    spilled_granules,
    /// Times that extents ran out.
    exhausted_count,
    /// Configuration keys that were not understood.
    config_unknown_keys,
    /// Arenas.
    arenas,
    /// Longest time that a move of a granule kept it inaccessible, in ns.
    move_stall_max_ns,
    /// `DEGRADED_*` bits.
    degraded_flags,
    /// Highest sum of live bytes on extents and in DRAM.
    heap_live_peak_total,
    /// Share of that peak on extents, in basis points (10,000 = all).
    extent_share_at_peak,
    /// Live granules that could not be moved before a fork, and so are missing
    /// in the child.
    unforked_granules,
    /// Nanoseconds that threads waited for granules that moved, all together.
    stall_ns,
    /// Granules that came back from the file.
    restored_granules,
    /// Granules whose file did not hold any more what was written.
    spill_lost_granules,
    /// Granules whose content was lost: a device took them by force, or they
    /// were found broken.
    lost_granules,
    /// Granules that are pinned now.
    pinned_granules,
    /// What was in use over the life of the heap: a sum of KiB times ms.
    live_over_time,
    /// The part of that on extents.
    extents_over_time,
}

/// Where in the page the client's key is, 16 bytes: it proves to a broker that
/// was started anew which client this is.
pub(super) const KEY_OFFSET: usize = PAGE_SIZE - 16;

/// Where the broker says that what a reader maps is gone: a word, 1 then.
pub(super) const LOST_OFFSET: usize = KEY_OFFSET - 8;

const _: () = assert!(size_of::<ClientPage>() <= LOST_OFFSET);
const _: () = assert!(size_of::<ClientPage>() == size_of::<ClientStats>());

/// A mapped client page. Dropping it unmaps the page, which ends the lease: a
/// heap keeps it for the life of the process.
pub struct ClientPageMapping {
    page: NonNull<ClientPage>,
}

// SAFETY: the page is only reached through `&ClientPage`, whose fields are atomics.
unsafe impl Send for ClientPageMapping {}
// SAFETY: as above.
unsafe impl Sync for ClientPageMapping {}

impl ClientPageMapping {
    /// Maps `page` (a memfd of at least [`PAGE_SIZE`] bytes) and keeps it from
    /// forked children, which hold no lease of their parent's.
    pub fn map(page: impl AsFd) -> Result<Self, Errno> {
        let mapping = Self::map_inherited(page)?;
        let address = mapping.page.as_ptr().cast();
        // SAFETY: exactly the mapping just made; children not inheriting it breaks nothing.
        unsafe { madvise(address, PAGE_SIZE, Advice::LinuxDontFork) }?;
        Ok(mapping)
    }

    /// The same, with forked children: for what they inherit as well.
    pub fn map_inherited(page: impl AsFd) -> Result<Self, Errno> {
        // A shorter file would raise SIGBUS at the first count.
        let stat = rustix::fs::fstat(&page)?;
        if stat.st_size < PAGE_SIZE as i64 {
            return Err(Errno::INVAL);
        }
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            mmap(
                ptr::null_mut(),
                PAGE_SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                page,
                0,
            )
        }?;
        Ok(Self {
            page: NonNull::new(address.cast()).ok_or(Errno::FAULT)?,
        })
    }

    /// Whether the broker has said that what this page stands for is gone.
    pub fn is_lost(&self) -> bool {
        // SAFETY: inside the mapped page (asserted below), aligned, and any
        // bits are a valid number; the broker writes it once.
        let word = unsafe { self.page.byte_add(LOST_OFFSET).cast::<AtomicU64>().as_ref() };
        word.load(Ordering::Acquire) != 0
    }

    /// The key that the broker wrote there.
    pub(super) fn key(&self) -> u128 {
        // SAFETY: inside the mapped page (asserted above), and 16 bytes from
        // the end of a page are aligned for it; any bits are a valid number.
        unsafe {
            self.page
                .byte_add(KEY_OFFSET)
                .cast::<u128>()
                .read_volatile()
        }
    }
}

impl Deref for ClientPageMapping {
    type Target = ClientPage;

    fn deref(&self) -> &ClientPage {
        // SAFETY: mapped readable and writable until drop, page-aligned, large
        // enough (asserted above), and every bit pattern is a valid atomic.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for ClientPageMapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and the borrow checker has ended all references.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), PAGE_SIZE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    #[test]
    fn counters_written_by_the_client_are_read_by_pread() {
        let fd = memfd_create("page", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, PAGE_SIZE as u64).unwrap();
        let page = ClientPageMapping::map(&fd).unwrap();
        page.pid.store(41, Ordering::Relaxed);
        page.extent_share_at_peak.store(9_950, Ordering::Relaxed);
        page.stalls[STALL_BUCKETS - 1].store(7, Ordering::Relaxed);
        let mut bytes = [0; PAGE_SIZE];
        rustix::io::pread(&fd, &mut bytes, 0).unwrap();
        let stats = ClientStats::from_bytes(&bytes);
        assert_eq!((stats.pid, stats.extent_share_at_peak), (41, 9_950));
        assert_eq!(stats.stalls[STALL_BUCKETS - 2..], [0, 7]);
        assert_eq!(stats, page.snapshot());
    }

    #[test]
    fn a_file_too_short_is_refused_instead_of_raising_sigbus() {
        let fd = memfd_create("page", MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(ClientPageMapping::map(&fd).err(), Some(Errno::INVAL));
    }
}
