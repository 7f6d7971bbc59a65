//! A buffer pool: pages of a file, in memory that the device writes by itself.
//!
//! Frames come in slabs of 2 MiB, each pinned: the file is read with O_DIRECT through io_uring, and a
//! transfer does not follow memory that moves. Under pressure whole slabs go, and with them their pins.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use dcmalloc::allocator_api2::vec::Vec as ArenaVec;
use dcmalloc::{Arena, PinError, PinGuard};
use io_uring::{IoUring, opcode, types};

/// Bytes of a page, and what O_DIRECT wants buffers aligned to.
pub const PAGE: usize = 16 << 10;
/// Frames of a slab: 2 MiB, a granule.
pub const SLAB_FRAMES: usize = (2 << 20) / PAGE;
/// Reads under way at a time.
const DEPTH: usize = 32;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Frame([u8; PAGE]);

/// What a frame holds.
#[derive(Clone, Copy, Default)]
struct Tenant {
    page: Option<u64>,
    /// CLOCK's mark: used since the hand came by.
    used: bool,
}

struct Slab {
    tenants: [Tenant; SLAB_FRAMES],
    // The pin ends before the memory goes: fields are dropped in this order.
    _pin: PinGuard,
    frames: ArenaVec<Frame, Arena>,
}

/// Why the pool could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The file can't be read.
    #[error("page {page} cannot be read: {source}")]
    Read {
        /// Which page.
        page: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// io_uring does not work.
    #[error("io_uring: {0}")]
    Ring(#[source] io::Error),
    /// Not even one slab can be had.
    #[error("no memory for a first slab of 2 MiB")]
    NoMemory,
}

/// Pages of one file, as many as there is memory for.
pub struct Pool {
    file: File,
    ring: IoUring,
    arena: Arena,
    slabs: Vec<Slab>,
    /// Where each page is: slab and frame.
    table: HashMap<u64, (usize, usize)>,
    hand: usize,
    /// Slabs that it may grow to.
    most: usize,
    /// Pages that were there, and that had to be read.
    pub hits: u64,
    /// Pages that had to be read.
    pub misses: u64,
}

impl Pool {
    /// A pool over `file`, opened with O_DIRECT, of up to `most` slabs of `arena`.
    ///
    /// # Errors
    /// [`PoolError::Ring`].
    pub fn new(file: File, arena: Arena, most: usize) -> Result<Self, PoolError> {
        Ok(Self {
            file,
            ring: IoUring::new(DEPTH as u32).map_err(PoolError::Ring)?,
            arena,
            slabs: Vec::new(),
            table: HashMap::new(),
            hand: 0,
            most,
            hits: 0,
            misses: 0,
        })
    }

    /// Slabs that it has.
    pub fn slabs(&self) -> usize {
        self.slabs.len()
    }

    /// Calls `f` with each of `pages`; those that are missing are read together.
    ///
    /// # Errors
    /// [`PoolError`]; `f` has seen none of the pages.
    pub fn with_pages(
        &mut self,
        pages: &[u64],
        mut f: impl FnMut(u64, &[u8]),
    ) -> Result<(), PoolError> {
        // A batch never turns out its own pages, as long as it is smaller than the smallest pool.
        for pages in pages.chunks(DEPTH) {
            let mut missing = Vec::new();
            for &page in pages {
                match self.table.get(&page) {
                    Some(&(slab, frame)) => {
                        self.hits += 1;
                        self.slabs[slab].tenants[frame].used = true;
                    }
                    None => {
                        self.misses += 1;
                        let (slab, frame) = self.free_frame()?;
                        self.slabs[slab].tenants[frame] = Tenant {
                            page: Some(page),
                            used: true,
                        };
                        self.table.insert(page, (slab, frame));
                        missing.push((page, slab, frame));
                    }
                }
            }
            if let Err(error) = self.read(&missing) {
                for &(page, slab, frame) in &missing {
                    self.table.remove(&page);
                    self.slabs[slab].tenants[frame] = Tenant::default();
                }
                return Err(error);
            }
            for page in pages {
                let (slab, frame) = self.table[page];
                f(*page, &self.slabs[slab].frames[frame].0);
            }
        }
        Ok(())
    }

    /// Drops up to `bytes` of slabs, the last ones, and keeps one; returns what went. It does not grow
    /// beyond what is left until [`Pool::may_grow`].
    pub fn shrink(&mut self, bytes: u64) -> u64 {
        let wanted = (bytes as usize).div_ceil(SLAB_FRAMES * PAGE);
        let keep = self.slabs.len().saturating_sub(wanted).max(1);
        let gone = self.slabs.len().saturating_sub(keep);
        self.slabs.truncate(keep);
        self.table.retain(|_, (slab, _)| *slab < keep);
        self.most = keep;
        self.hand = 0;
        (gone * SLAB_FRAMES * PAGE) as u64
    }

    /// Whether it may have less than `most` slabs.
    pub fn is_shrunk(&self, most: usize) -> bool {
        self.most < most
    }

    /// Lets it grow to `most` slabs again.
    pub fn may_grow(&mut self, most: usize) {
        self.most = most;
    }

    /// A frame to read into: a new slab's if there may be one, otherwise the next that CLOCK finds unused.
    fn free_frame(&mut self) -> Result<(usize, usize), PoolError> {
        let empty = |slab: &Slab| slab.tenants.iter().position(|t| t.page.is_none());
        if let Some(slab) = self.slabs.last()
            && let Some(frame) = empty(slab)
        {
            return Ok((self.slabs.len() - 1, frame));
        }
        if self.slabs.len() < self.most
            && let Some(slab) = self.new_slab()
        {
            self.slabs.push(slab);
            return Ok((self.slabs.len() - 1, 0));
        }
        let frames = self.slabs.len() * SLAB_FRAMES;
        // Twice around at most: the first time takes every mark away.
        for _ in 0..2 * frames {
            let (slab, frame) = (self.hand / SLAB_FRAMES, self.hand % SLAB_FRAMES);
            self.hand = (self.hand + 1) % frames;
            let tenant = &mut self.slabs[slab].tenants[frame];
            if !std::mem::take(&mut tenant.used) {
                if let Some(page) = tenant.page.take() {
                    self.table.remove(&page);
                }
                return Ok((slab, frame));
            }
        }
        Err(PoolError::NoMemory)
    }

    /// `None` if there is no memory, or it does not stay where it is.
    fn new_slab(&self) -> Option<Slab> {
        let mut frames = ArenaVec::new_in(self.arena.clone());
        frames.try_reserve_exact(SLAB_FRAMES).ok()?;
        frames.resize(SLAB_FRAMES, Frame([0; PAGE]));
        let pinned: Result<_, PinError> = self
            .arena
            .heap()
            .pin(frames.as_ptr().cast(), SLAB_FRAMES * PAGE);
        Some(Slab {
            tenants: [Tenant::default(); SLAB_FRAMES],
            _pin: pinned.ok()?,
            frames,
        })
    }

    /// Reads pages into frames, all at once.
    fn read(&mut self, missing: &[(u64, usize, usize)]) -> Result<(), PoolError> {
        if missing.is_empty() {
            return Ok(());
        }
        for (number, &(page, slab, frame)) in missing.iter().enumerate() {
            let target = self.slabs[slab].frames[frame].0.as_mut_ptr();
            let read = opcode::Read::new(types::Fd(self.file.as_raw_fd()), target, PAGE as u32)
                .offset(page * PAGE as u64)
                .build()
                .user_data(number as u64);
            // SAFETY: the frame is a whole page of memory that is neither moved (its slab is pinned) nor
            // looked at before the read is waited for below; there are no more reads than entries.
            unsafe { self.ring.submission().push(&read) }.expect("as many entries as reads");
        }
        // All that were submitted are waited for, come what may: until then the kernel writes.
        let (mut submitted, mut waited, mut failed) = (0, 0, None);
        while waited < missing.len() {
            match self.ring.submit_and_wait(1) {
                Ok(entries) => submitted += entries,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if waited < submitted => {
                    std::thread::sleep(Duration::from_millis(1));
                    failed = Some(PoolError::Ring(error));
                }
                Err(error) => {
                    // What is still queued must not be read later, into a frame of something else.
                    self.ring = IoUring::new(DEPTH as u32).map_err(PoolError::Ring)?;
                    return Err(PoolError::Ring(error));
                }
            }
            for done in self.ring.completion() {
                waited += 1;
                let page = missing[done.user_data() as usize].0;
                let source = match done.result() {
                    n if n == PAGE as i32 => continue,
                    n if n < 0 => io::Error::from_raw_os_error(-n),
                    _ => io::ErrorKind::UnexpectedEof.into(),
                };
                failed = Some(PoolError::Read { page, source });
            }
        }
        failed.map_or(Ok(()), Err)
    }
}
