//! The heap as a Rust program's global allocator.

use core::alloc::{GlobalAlloc, Layout};

use crate::arena::ArenaBuilder;
use crate::config::Config;
use crate::engine;
use crate::heap::Heap;
use crate::source::ExtentSource;
use crate::stats::Stats;

/// A global allocator that keeps what its placement says on extents.
///
/// Until a source is attached everything is in DRAM.
///
/// ```
/// use allocator::DcMalloc;
///
/// #[global_allocator]
/// static HEAP: DcMalloc = DcMalloc::new();
///
/// fn main() {
///     let words = vec![7u64; 100_000];
///     assert_eq!(words.iter().sum::<u64>(), 700_000);
///     assert!(HEAP.stats().allocated >= 800_000);
/// }
/// ```
pub struct DcMalloc {
    heap: Heap,
    config: Config,
}

impl Default for DcMalloc {
    fn default() -> Self {
        Self::new()
    }
}

impl DcMalloc {
    /// With the default settings: 64 KiB and more on extents.
    pub const fn new() -> Self {
        Self::with(Config::DEFAULT)
    }

    /// With given settings.
    pub const fn with(config: Config) -> Self {
        Self {
            heap: Heap::new(),
            config,
        }
    }

    /// Attaches the source of extents.
    ///
    /// # Errors
    /// The kernel's, if there is no memory for tables or a thread.
    pub fn attach(
        &'static self,
        source: &'static dyn ExtentSource,
    ) -> Result<(), rustix::io::Errno> {
        self.heap().attach(source)
    }

    /// What the heap holds.
    pub fn stats(&'static self) -> Stats {
        self.heap().stats()
    }

    /// An arena of its own for a part of the program: see [`Heap::arena`].
    pub fn arena(&'static self, name: &str) -> ArenaBuilder {
        self.heap().arena(name)
    }

    /// The heap itself, started.
    pub fn heap(&'static self) -> &'static Heap {
        if !self.heap.is_started() {
            self.heap.start(self.config);
        }
        &self.heap
    }

    /// A global allocator is a static, but its trait does not say so.
    fn forever(&self) -> &'static Self {
        // SAFETY: `GlobalAlloc` is only called on the `#[global_allocator]`,
        // which is a static.
        unsafe { &*(self as *const Self) }
    }
}

// SAFETY: memory comes from the engine, which serves any size and alignment,
// never unwinds, and keeps blocks disjoint.
unsafe impl GlobalAlloc for DcMalloc {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.forever()
            .heap()
            .allocate(layout.size(), layout.align(), false)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.forever()
            .heap()
            .allocate(layout.size(), layout.align(), true)
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller allocated it here with this layout.
        unsafe { engine::free_sized(ptr, layout.size().max(1), layout.align()) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller allocated it here with this layout.
        unsafe {
            self.forever()
                .heap()
                .reallocate(ptr, new_size, layout.align())
        }
    }
}
