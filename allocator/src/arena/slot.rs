//! The table of arenas: static memory, since the heap's own threads read it.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::OnceLock;

use super::builder::{ArenaError, Settings};
use super::callbacks::{Told, callbacks};
use super::threads::{self, Tables};
use crate::engine::{self, Account, ArenaIndex, Hooks};
use crate::heap::Heap;
use crate::placement::Placement;
use crate::space::{Domain, Owner, Tier};
use crate::sync::Lock;

/// Arenas that a process may have at a time.
pub(super) const SLOTS: usize = 256;

/// One arena, or the place of one.
pub(crate) struct Slot {
    /// Odd while there is an arena; another number for each.
    generation: AtomicU32,
    /// Clones of its handle.
    pub(super) handles: AtomicUsize,
    /// The heap that this slot has ever served: its hooks are of its space.
    heap: OnceLock<&'static Heap>,
    hooks: OnceLock<[Hooks; 2]>,
    pub(super) account: Account,
    /// By tier; 0: none.
    engines: [AtomicU32; 2],
    /// Requests below this many bytes go to DRAM.
    threshold: AtomicUsize,
    /// Bytes of granules whose content was lost.
    lost: AtomicU64,
    /// Its owner wants to hear of losses.
    hears: AtomicBool,
    pub(super) told: Lock<Option<Told>>,
}

impl Slot {
    const fn new() -> Self {
        Self {
            generation: AtomicU32::new(0),
            handles: AtomicUsize::new(0),
            heap: OnceLock::new(),
            hooks: OnceLock::new(),
            account: Account::new(),
            engines: [const { AtomicU32::new(0) }; 2],
            threshold: AtomicUsize::new(0),
            lost: AtomicU64::new(0),
            hears: AtomicBool::new(false),
            told: Lock::new(None),
        }
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    fn is_open(&self) -> bool {
        !self.generation().is_multiple_of(2)
    }

    pub(super) fn index(&self) -> usize {
        let start = &raw const TABLE.slots;
        (core::ptr::from_ref(self).addr() - start.addr()) / size_of::<Self>()
    }

    pub(super) fn id(&self) -> u64 {
        u64::from(self.generation()) << 16 | self.index() as u64
    }

    pub(super) fn heap(&self) -> &'static Heap {
        self.heap.get().expect("an open slot has a heap")
    }

    /// The engine's arena for a request of `size` bytes.
    #[inline]
    pub(super) fn engine(&self, size: usize) -> Option<ArenaIndex> {
        let tier = match size < self.threshold.load(Ordering::Relaxed) {
            true => Tier::Dram,
            false => Tier::Extent,
        };
        ArenaIndex::from_slot(self.engines[tier as usize].load(Ordering::Acquire))
    }

    pub(super) fn engines(&self) -> impl Iterator<Item = ArenaIndex> + '_ {
        let made = |slot: &AtomicU32| ArenaIndex::from_slot(slot.load(Ordering::Acquire));
        self.engines.iter().filter_map(made)
    }

    pub(super) fn lost_bytes(&self) -> u64 {
        self.lost.load(Ordering::Acquire)
    }

    pub(super) fn name(&self) -> String {
        let told = self.told.lock();
        told.as_ref()
            .map(|told| told.name.clone())
            .unwrap_or_default()
    }

    fn may_serve(&self, heap: &'static Heap) -> bool {
        let same = |other: &&'static Heap| core::ptr::eq(*other, heap);
        !self.is_open() && self.heap.get().is_none_or(same)
    }

    fn open(&'static self, heap: &'static Heap, settings: Settings) -> Result<(), ArenaError> {
        let _ = self.heap.set(heap);
        let owner = Owner::arena(self.index() as u16);
        let hooks = self.hooks.get_or_init(|| {
            [Tier::Dram, Tier::Extent].map(|tier| {
                let domain = Domain { tier, owner };
                Hooks::new(heap.space(), domain, heap.supply(), Some(&self.account))
            })
        });
        let (threshold, tiers): (_, &[Tier]) = match settings.placement {
            Placement::Dram => (usize::MAX, &[Tier::Dram]),
            Placement::Dc => (0, &[Tier::Extent]),
            Placement::Size(bytes) => (engine::whole_class(bytes), &[Tier::Dram, Tier::Extent]),
            Placement::Interleave(_) => return Err(ArenaError::Interleave),
        };
        if !heap.space().assign(owner, settings.tag) {
            return Err(ArenaError::Tags);
        }
        self.account.open(settings.limit, settings.on_exhausted);
        self.threshold.store(threshold, Ordering::Relaxed);
        self.lost.store(0, Ordering::Relaxed);
        callbacks().forget_lost(self.index());
        let hears = settings.told.lost.is_some();
        self.hears.store(hears, Ordering::Relaxed);
        for tier in tiers {
            let Some(arena) = ArenaIndex::create(&hooks[*tier as usize], heap.decay_ms(*tier))
            else {
                self.close();
                return Err(ArenaError::Engine);
            };
            self.engines[*tier as usize].store(arena.to_slot(), Ordering::Release);
        }
        *self.told.lock() = Some(settings.told);
        self.handles.store(1, Ordering::Relaxed);
        self.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Ends the engine's arenas, and its claim to a tag.
    fn close(&self) {
        for slot in &self.engines {
            if let Some(arena) = ArenaIndex::from_slot(slot.swap(0, Ordering::AcqRel)) {
                arena.destroy();
            }
        }
        let owner = Owner::arena(self.index() as u16);
        self.heap().space().unassign(owner);
    }
}

pub(crate) struct Table {
    slots: [Slot; SLOTS],
    /// Held while an arena is made or ended, and while the heap's worker goes
    /// through them.
    threads: Lock<Tables>,
}

static TABLE: Table = Table {
    slots: [const { Slot::new() }; SLOTS],
    threads: Lock::new(Tables::NONE),
};

pub(crate) fn table() -> &'static Table {
    &TABLE
}

impl Table {
    pub(super) fn slot(&'static self, index: usize) -> &'static Slot {
        &self.slots[index]
    }

    pub(super) fn threads(&self) -> &Lock<Tables> {
        &self.threads
    }

    pub(super) fn by_id(&'static self, id: u64) -> Option<&'static Slot> {
        let slot = self.slots.get((id & 0xffff) as usize)?;
        (slot.is_open() && slot.id() == id).then_some(slot)
    }

    pub(super) fn open(
        &'static self,
        heap: &'static Heap,
        settings: Settings,
    ) -> Result<&'static Slot, ArenaError> {
        let _held = self.threads.lock();
        let free = self.slots.iter().find(|slot| slot.may_serve(heap));
        let slot = free.ok_or(ArenaError::TooMany)?;
        slot.open(heap, settings)?;
        Ok(slot)
    }

    /// Ends an arena.
    ///
    /// # Safety
    /// Nobody uses it or anything that was allocated from it.
    pub(super) unsafe fn end(&self, slot: &'static Slot) {
        let held = self.threads.lock();
        threads::destroy_all(&held, slot);
        slot.generation.fetch_add(1, Ordering::Release);
        slot.close();
        let told = slot.told.lock().take();
        drop(held);
        // Dropped with no lock held: callbacks may own arenas themselves.
        drop(told);
    }

    /// The arenas that there are.
    pub(super) fn open_slots(&'static self) -> impl Iterator<Item = &'static Slot> {
        self.slots.iter().filter(|slot| slot.is_open())
    }

    /// Calls `f` with the engine's arenas that take extents of `heap`; none is
    /// ended meanwhile.
    pub(crate) fn each_on_extents(&'static self, heap: &Heap, f: impl Fn(ArenaIndex)) {
        let _held = self.threads.lock();
        for slot in self.open_slots() {
            if core::ptr::eq(slot.heap(), heap)
                && let arena = slot.engines[Tier::Extent as usize].load(Ordering::Acquire)
                && let Some(arena) = ArenaIndex::from_slot(arena)
            {
                f(arena);
            }
        }
    }

    /// Whether an arena's owner wants to hear of losses, and can be told.
    pub(crate) fn hears(&self, owner: Owner) -> bool {
        owner
            .slot()
            .is_some_and(|slot| self.slots[slot].hears.load(Ordering::Relaxed))
            && callbacks().tells_losses()
    }

    /// Marks an arena as lost and has its owner told. In static memory only.
    pub(crate) fn note_lost(&self, owner: Owner, bytes: u64) {
        if let Some(slot) = owner.slot() {
            self.slots[slot].lost.fetch_add(bytes, Ordering::AcqRel);
            callbacks().tell_lost(slot, bytes);
        }
    }

    /// How many there are.
    pub(crate) fn count(&'static self) -> usize {
        self.open_slots().count()
    }

    /// Nobody makes or ends an arena until [`Table::after_fork`].
    pub(crate) fn before_fork(&self) {
        core::mem::forget(self.threads.lock());
    }

    /// # Safety
    /// The calling thread called [`Table::before_fork`], or is its copy.
    pub(crate) unsafe fn after_fork(&self) {
        // SAFETY: this thread holds the lock, whose guard it forgot.
        unsafe { self.threads.force_unlock() };
    }

    /// In a child, before [`Table::after_fork`]: nobody is reading names or
    /// callbacks, and nobody is in the middle of using a thread cache.
    pub(crate) fn in_child(&self) {
        for slot in &self.slots {
            // SAFETY: the child has one thread, and it holds none of these.
            unsafe { slot.told.force_unlock() };
        }
        // SAFETY: the copy of the thread that called `before_fork`.
        unsafe { self.threads.force_unlock() };
        let held = self.threads.lock();
        threads::forget_others(&held);
        core::mem::forget(held);
    }
}
