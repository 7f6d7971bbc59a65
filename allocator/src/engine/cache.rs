//! Thread caches apart from the automatic one (`tcache.create` in
//! jemalloc(3)): what is freed into one comes out of it again, so that arenas
//! that have each their own never mix.
#![forbid(unsafe_code)]

use core::ffi::{c_int, c_uint};
use tikv_jemalloc_sys as je;

use super::control::exchange;

/// A cache for one thread at a time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cache(c_uint);

impl Cache {
    /// A new cache. `None`: there is no memory, or there are 4,094 of them.
    pub(crate) fn create() -> Option<Self> {
        let mut index: c_uint = 0;
        exchange::<_, ()>(c"tcache.create", Some(&mut index), None)?;
        Some(Self(index))
    }

    /// Gives what it holds to the arenas that it is from.
    pub(crate) fn flush(self) {
        exchange::<(), _>(c"tcache.flush", None, Some(self.0));
    }

    /// Ends it; what it holds goes as with [`Cache::flush`].
    pub(crate) fn destroy(self) {
        exchange::<(), _>(c"tcache.destroy", None, Some(self.0));
    }

    /// For a table in which 0 means none.
    pub(crate) fn to_entry(self) -> u32 {
        self.0 + 1
    }

    /// The inverse of [`Cache::to_entry`].
    pub(crate) fn from_entry(entry: u32) -> Option<Self> {
        entry.checked_sub(1).map(Self)
    }

    #[inline]
    pub(super) fn flag(cache: Option<Self>) -> c_int {
        match cache {
            Some(Self(index)) => je::MALLOCX_TCACHE(index as usize),
            None => je::MALLOCX_TCACHE_NONE,
        }
    }
}
