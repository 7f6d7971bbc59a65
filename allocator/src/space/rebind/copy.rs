//! The copy of a granule.

use super::staging::populate_live;
use super::{LivePages, PAGE};
use rustix::io::Errno;
use rustix::mm::Advice;

/// Whether the live pages of an extent's granule can be read: one that has
/// gone would raise SIGBUS.
///
/// # Errors
/// `EFAULT`, `ENOMEM` or `EHWPOISON`.
pub fn readable(alias: usize, live: &LivePages) -> Result<(), Errno> {
    populate_live(alias, live, Advice::LinuxPopulateRead)
}

/// Copies the live pages, around the cache: the target need not be read first,
/// which halves the time of a memcpy, and what the program has in the cache
/// stays there.
///
/// # Safety
/// Both are granules, do not overlap, and nobody writes to either meanwhile.
pub(super) unsafe fn copy_live(from: *const u8, to: *mut u8, live: &LivePages) {
    for pages in live.runs() {
        let (at, len) = (pages.start * PAGE, pages.len() * PAGE);
        // SAFETY: whole pages of a granule.
        unsafe { stream(from.add(at), to.add(at), len) };
    }
}

/// # Safety
/// As `copy_nonoverlapping`; addresses and length are multiples of a page.
#[cfg(target_arch = "x86_64")]
unsafe fn stream(from: *const u8, to: *mut u8, len: usize) {
    use core::arch::x86_64::{__m128i, _mm_load_si128, _mm_sfence, _mm_stream_si128};
    use core::arch::x86_64::{_MM_HINT_NTA, _mm_prefetch};
    const LINE: usize = 64 / size_of::<__m128i>();
    /// So far ahead the source is fetched, past the caches as well: 4 to 8 %
    /// more than the hardware's own prefetching. Past the end it does nothing.
    const AHEAD: usize = 2048;

    let (from, to) = (from.cast::<__m128i>(), to.cast::<__m128i>());
    let mut at = 0;
    while at < len / size_of::<__m128i>() {
        // SAFETY: a cache line within both pages; SSE2 is part of x86-64.
        unsafe {
            _mm_prefetch::<_MM_HINT_NTA>(from.add(at).cast::<i8>().wrapping_add(AHEAD));
            let line: [_; LINE] = core::array::from_fn(|i| _mm_load_si128(from.add(at + i)));
            for (i, word) in line.into_iter().enumerate() {
                _mm_stream_si128(to.add(at + i), word);
            }
        }
        at += LINE;
    }
    // Streamed stores are ordered with nothing; the mapping is given away
    // next, and another thread reads it.
    // SAFETY: SSE is part of x86-64.
    unsafe { _mm_sfence() };
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn stream(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller's.
    unsafe { core::ptr::copy_nonoverlapping(from, to, len) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::rebind::GRANULE;

    #[repr(align(4096))]
    struct Granule([u8; GRANULE]);

    fn granule(fill: impl Fn(usize) -> u8) -> Box<Granule> {
        let zeroed = Box::<Granule>::new_zeroed();
        // SAFETY: zeroes are bytes.
        let mut granule = unsafe { zeroed.assume_init() };
        granule
            .0
            .iter_mut()
            .enumerate()
            .for_each(|(i, byte)| *byte = fill(i));
        granule
    }

    #[test]
    fn live_pages_are_copied_and_no_others() {
        let from = granule(|i| (i / 7) as u8);
        let mut live = LivePages([0; 8]);
        (live.0[0], live.0[3], live.0[7]) = (0b1011, !0, 1 << 63);
        let mut to = granule(|_| 0xEE);
        // SAFETY: two granules of this test.
        unsafe { copy_live(from.0.as_ptr(), to.0.as_mut_ptr(), &live) };
        for (page, bytes) in to.0.chunks(PAGE).enumerate() {
            let at = page * PAGE;
            match live.0[page / 64] >> (page % 64) & 1 {
                1 => assert!(bytes == &from.0[at..at + PAGE], "page {page}"),
                _ => assert!(bytes.iter().all(|&byte| byte == 0xEE), "page {page}"),
            }
        }
    }
}
