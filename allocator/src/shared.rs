//! Capacity that several hosts share, mapped to be read.

use core::ops::Deref;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicPtr, Ordering};
use std::borrow::Cow;

use crate::arena::Arena;
use crate::heap::Heap;
use crate::tag::Tag;

/// Why shared capacity could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SharedError {
    /// There is nobody to lend it.
    #[error("no heap of this process has a broker: attach one first")]
    NoLender,
    /// The lender has not got it, or can't give it: its reason.
    #[error("{0}")]
    Refused(Cow<'static, str>),
    /// No connection to the lender, or no addresses: the reason.
    #[error("{0}")]
    Failed(String),
}

/// What keeps shared capacity mapped: dropping it unmaps it.
pub trait SharedLease: Send + Sync {
    /// The mapped bytes, readable until this is dropped.
    fn bytes(&self) -> NonNull<[u8]>;

    /// Whether they were taken away meanwhile.
    fn is_lost(&self) -> bool;
}

/// The shared extents of one tag, all of them, as one slice of bytes in the
/// order of their sequence numbers; read-only. See [`Arena::open_shared`].
pub struct SharedExtents {
    lease: Box<dyn SharedLease>,
}

impl SharedExtents {
    /// What a lender has mapped.
    ///
    /// # Safety
    /// The bytes stay readable until `lease` is dropped, and nobody writes them.
    pub unsafe fn new(lease: Box<dyn SharedLease>) -> Self {
        Self { lease }
    }

    /// Whether the device has taken the capacity by force. What is read since
    /// then means nothing.
    pub fn is_lost(&self) -> bool {
        self.lease.is_lost()
    }
}

impl Deref for SharedExtents {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: as promised to `new`.
        unsafe { self.lease.bytes().as_ref() }
    }
}

impl core::fmt::Debug for SharedExtents {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("SharedExtents")
            .field("len", &self.len())
            .field("is_lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

/// The heap of this process that has a lender.
static ATTACHED: AtomicPtr<Heap> = AtomicPtr::new(core::ptr::null_mut());

/// A heap has a lender: shared capacity is opened through it.
pub(crate) fn attached(heap: &'static Heap) {
    ATTACHED.store(core::ptr::from_ref(heap).cast_mut(), Ordering::Release);
}

impl Arena {
    /// Maps the capacity that the fabric manager has given several hosts under
    /// `tag`: all of its extents or none, in the order of their sequence
    /// numbers, read-only. Several processes and hosts may have it open at a
    /// time, as often as they like; it takes no memory of its own and is no part
    /// of any arena.
    ///
    /// As long as it is open the tag goes back to nobody: a release is refused
    /// by name, as of a pin. A forced release loses it, which
    /// [`SharedExtents::is_lost`] tells.
    ///
    /// ```no_run
    /// use allocator::Arena;
    ///
    /// let tag = "7f3e2a90-0000-4000-8000-000000000001".parse()?;
    /// // SAFETY: whoever filled it has finished before it told us the tag.
    /// let words = unsafe { Arena::open_shared(tag) }?;
    /// println!("{} bytes, the first {:?}", words.len(), words.first());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`SharedError`]: no broker, no such tag, or one that is not shared.
    ///
    /// # Safety
    /// Nobody writes the capacity while it is open: neither another host (CXL
    /// r3.1 does not promise that a write there is seen here whole) nor a
    /// process of this one.
    pub unsafe fn open_shared(tag: Tag) -> Result<SharedExtents, SharedError> {
        let heap = ATTACHED.load(Ordering::Acquire);
        // SAFETY: null, or a heap that stays.
        let heap: Option<&'static Heap> = unsafe { heap.as_ref() };
        let source = heap.and_then(|heap| heap.service().lender());
        source.ok_or(SharedError::NoLender)?.open_shared(tag)
    }
}
