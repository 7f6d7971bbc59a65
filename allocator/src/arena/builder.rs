//! Making an arena.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::callbacks::{Kind, Lost, Pressure, Told, callbacks};
use super::{Arena, MAX_ARENAS, MAX_NAME, table};
use crate::heap::Heap;
use crate::placement::{OnExhausted, Placement};
use crate::tag::Tag;

/// Why there is no arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// There are [`MAX_ARENAS`] already.
    #[error("there are {MAX_ARENAS} arenas already: drop one that is not needed")]
    TooMany,
    /// The name does not fit.
    #[error("an arena's name has at most {MAX_NAME} bytes, this one has {0}")]
    Name(usize),
    /// Interleaving is for the whole heap.
    #[error("an arena can't interleave: choose dram, dc or size, or interleave the heap")]
    Interleave,
    /// The heap has no addresses, or could not be started.
    #[error("the heap has no addresses to use (RLIMIT_AS): allow the process more")]
    NoSpace,
    /// The engine has no memory for its own structures.
    #[error("no memory for the structures of another arena")]
    Engine,
    /// Arenas of this process have as many different tags as there can be.
    #[error(
        "arenas of this process have 15 different tags already: drop those of one, and wait until \
         its extents are given back"
    )]
    Tags,
    /// No thread to run callbacks on.
    #[error("no thread for callbacks: {0}")]
    Thread(rustix::io::Errno),
}

pub(super) struct Settings {
    pub(super) placement: Placement,
    pub(super) tag: Tag,
    pub(super) limit: Option<u64>,
    pub(super) on_exhausted: OnExhausted,
    pub(super) told: Told,
}

/// An arena to be: see [`Heap::arena`].
#[must_use = "nothing is made before `build`"]
pub struct ArenaBuilder {
    heap: &'static Heap,
    settings: Settings,
}

impl ArenaBuilder {
    pub(crate) fn new(heap: &'static Heap, name: &str) -> Self {
        let config = heap.config();
        Self {
            heap,
            settings: Settings {
                placement: Placement::Dc,
                tag: Tag::NONE,
                limit: None,
                on_exhausted: config.on_exhausted,
                told: Told::new(name),
            },
        }
    }

    /// Where allocations go; without this, all of them on extents.
    pub fn placement(mut self, placement: Placement) -> Self {
        self.settings.placement = placement;
        self
    }

    /// Its extents are those that the fabric manager has given under this tag,
    /// and no others; nobody else gets any of them. Where none is left, what
    /// [`ArenaBuilder::on_exhausted`] says holds as ever, and what lies in DRAM
    /// for want of them moves when some come. What a tag has is lent granule by
    /// granule but goes back to the device whole. Without this, extents without
    /// a tag.
    ///
    /// ```
    /// # use allocator::DcMalloc;
    /// # static HEAP: DcMalloc = DcMalloc::new();
    /// let tag = "7f3e2a90-0000-4000-8000-000000000001".parse()?;
    /// let arena = HEAP.arena("training set").tag(tag).build()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn tag(mut self, tag: Tag) -> Self {
        self.settings.tag = tag;
        self
    }

    /// Bytes of pages that it may have; without this, any. What has been freed
    /// counts until it is purged, which a full arena does by itself.
    pub fn limit(mut self, bytes: u64) -> Self {
        self.settings.limit = Some(bytes);
        self
    }

    /// What an allocation does when no extent is left; without this, what the
    /// heap does.
    pub fn on_exhausted(mut self, policy: OnExhausted) -> Self {
        self.settings.on_exhausted = policy;
        self
    }

    /// How dear its content is: when extents are recalled, arenas of low
    /// priority are asked first. Without this, 0.
    pub fn priority(mut self, priority: i32) -> Self {
        self.settings.told.priority = priority;
        self
    }

    /// Called when extents are recalled and what is unused is not enough: time
    /// to drop what can be made again.
    ///
    /// It runs on a thread of its own, one callback at a time, and may
    /// allocate, free, block and panic; it is waited for until about half of
    /// the recall's time is over, and what is then still live is moved. It
    /// must not own a clone of its own arena, or the arena never ends: let it
    /// own a [`std::sync::Weak`] of what is in there.
    pub fn on_pressure(mut self, callback: impl Fn(&Pressure) + Send + Sync + 'static) -> Self {
        self.settings.told.pressure = Some(Arc::new(callback));
        self
    }

    /// Called when content of the arena was lost: a device took its memory by
    /// force, or found it broken. With this, what is lost reads as zeroes and
    /// the process lives; without it, touching it raises SIGBUS (unless the
    /// setting `on_lost` says otherwise). Runs as [`ArenaBuilder::on_pressure`]
    /// does.
    pub fn on_lost(mut self, callback: impl Fn(&Lost) + Send + Sync + 'static) -> Self {
        self.settings.told.lost = Some(Arc::new(callback));
        self
    }

    /// Makes the arena.
    ///
    /// # Errors
    /// See [`ArenaError`]; nothing is left behind.
    pub fn build(self) -> Result<Arena, ArenaError> {
        let told = &self.settings.told;
        if told.name.len() > MAX_NAME {
            return Err(ArenaError::Name(told.name.len()));
        }
        if !self.heap.space().has_room_for(1) {
            return Err(ArenaError::NoSpace);
        }
        for (kind, wanted) in [
            (Kind::Pressure, told.pressure.is_some()),
            (Kind::Loss, told.lost.is_some()),
        ] {
            if wanted {
                callbacks().start(kind).map_err(ArenaError::Thread)?;
            }
        }
        let slot = table().open(self.heap, self.settings)?;
        Ok(Arena { slot })
    }
}
