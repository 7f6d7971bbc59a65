//! Which cache a thread uses for which arena.
//!
//! One page for each thread, in memory of our own, found through a
//! thread-local without a destructor; a pthread key's destructor gives the
//! caches up when the thread ends.

use core::cell::Cell;
use core::ffi::c_void;
use core::ptr::null;
use core::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::OnceLock;

use super::slot::{SLOTS, Slot, table};
use crate::engine::Cache;
use crate::space::map_table;
use crate::sync::Guard;

#[derive(Default)]
struct Entry {
    /// Of the arena that the cache is for; 0: none.
    generation: AtomicU32,
    cache: AtomicU32,
}

/// The caches of one thread; all zero: none.
struct Caches {
    entries: [Entry; SLOTS],
    next: AtomicPtr<Caches>,
    /// The thread is there.
    used: AtomicU32,
}

/// All pages of caches; those of ended threads are used again.
pub(super) struct Tables(*const Caches);

// SAFETY: pages that stay for ever, whose fields are atomic.
unsafe impl Send for Tables {}

impl Tables {
    pub(super) const NONE: Self = Self(null());

    fn iter(&self) -> impl Iterator<Item = &'static Caches> {
        let mut at = self.0;
        core::iter::from_fn(move || {
            // SAFETY: null, or a page that stays for ever.
            let page = unsafe { at.as_ref() }?;
            at = page.next.load(Ordering::Acquire);
            Some(page)
        })
    }
}

thread_local! {
    /// This thread's page; null: none yet; [`GONE`]: the thread ends.
    static MINE: Cell<*const Caches> = const { Cell::new(null()) };
}
const GONE: *const Caches = core::ptr::without_provenance(1);

/// The cache of this thread for an arena. `None`: it can have none.
#[inline]
pub(super) fn cache(slot: &'static Slot) -> Option<Cache> {
    let page = MINE.get();
    if page.addr() > GONE.addr() {
        // SAFETY: neither null nor the mark, so a page of this thread.
        let entry = unsafe { &(*page).entries[slot.index()] };
        if entry.generation.load(Ordering::Relaxed) == slot.generation() {
            return Cache::from_entry(entry.cache.load(Ordering::Relaxed));
        }
    }
    make(slot)
}

#[cold]
fn make(slot: &'static Slot) -> Option<Cache> {
    let page = mine()?;
    // Made with no lock held: it allocates from the heap.
    let cache = Cache::create()?;
    let entry = &page.entries[slot.index()];
    entry.cache.store(cache.to_entry(), Ordering::Relaxed);
    entry.generation.store(slot.generation(), Ordering::Release);
    Some(cache)
}

/// This thread's page, made if need be.
fn mine() -> Option<&'static Caches> {
    let page = MINE.get();
    if page == GONE {
        return None;
    }
    // SAFETY: null, or this thread's page, which stays for ever.
    if let Some(page) = unsafe { page.as_ref() } {
        return Some(page);
    }
    let key = key()?;
    let page = {
        let mut tables = table().threads().lock();
        let unused = tables
            .iter()
            .find(|page| page.used.load(Ordering::Acquire) == 0);
        let page = match unused {
            Some(page) => page,
            None => {
                let new = map_table(size_of::<Caches>()).ok()? as *const Caches;
                // SAFETY: zeroed memory of its size, aligned to a page, for ever.
                let page = unsafe { &*new };
                page.next.store(tables.0.cast_mut(), Ordering::Release);
                tables.0 = new;
                page
            }
        };
        page.used.store(1, Ordering::Release);
        page
    };
    MINE.set(page);
    // Beyond the first 32 keys this allocates, which uses no arena of ours.
    // SAFETY: a key that was made, and any pointer.
    unsafe { libc::pthread_setspecific(key, core::ptr::from_ref(page).cast()) };
    Some(page)
}

fn key() -> Option<libc::pthread_key_t> {
    static KEY: OnceLock<Option<libc::pthread_key_t>> = OnceLock::new();
    *KEY.get_or_init(|| {
        let mut key = 0;
        // SAFETY: a place for a key, and a destructor that lives for ever.
        let code = unsafe { libc::pthread_key_create(&mut key, Some(thread_ends)) };
        (code == 0).then_some(key)
    })
}

unsafe extern "C" fn thread_ends(page: *mut c_void) {
    MINE.set(GONE);
    // SAFETY: `mine` set it: this thread's page, which stays for ever.
    let page = unsafe { &*page.cast_const().cast::<Caches>() };
    let _held = table().threads().lock();
    for entry in &page.entries {
        if entry.generation.swap(0, Ordering::AcqRel) != 0
            && let Some(cache) = Cache::from_entry(entry.cache.load(Ordering::Relaxed))
        {
            cache.destroy();
        }
    }
    page.used.store(0, Ordering::Release);
}

/// Gives what this thread's cache keeps of an arena back to it.
pub(super) fn flush(slot: &'static Slot) {
    let page = MINE.get();
    if page.addr() > GONE.addr() {
        // SAFETY: neither null nor the mark, so a page of this thread.
        let entry = unsafe { &(*page).entries[slot.index()] };
        if entry.generation.load(Ordering::Relaxed) == slot.generation()
            && let Some(cache) = Cache::from_entry(entry.cache.load(Ordering::Relaxed))
        {
            cache.flush();
        }
    }
}

/// The same for every thread's; none of them uses the arena meanwhile.
pub(super) fn flush_all(slot: &'static Slot) {
    let tables = table().threads().lock();
    caches_of(&tables, slot).for_each(|(_, cache)| cache.flush());
}

/// Ends every thread's cache of an arena that nobody uses any more.
pub(super) fn destroy_all(tables: &Guard<'_, Tables>, slot: &'static Slot) {
    for (entry, cache) in caches_of(tables, slot) {
        entry.generation.store(0, Ordering::Release);
        cache.destroy();
    }
}

/// In a child: the caches of threads that it does not have stay as they are,
/// for ever. The engine takes no lock of theirs at a fork, so one may have
/// been given back in part, and would give the same back again.
pub(super) fn forget_others(tables: &Guard<'_, Tables>) {
    let mine = MINE.get();
    for page in tables.iter().filter(|page| !core::ptr::eq(*page, mine)) {
        for entry in &page.entries {
            entry.generation.store(0, Ordering::Relaxed);
        }
        page.used.store(0, Ordering::Relaxed);
    }
}

fn caches_of(
    tables: &Guard<'_, Tables>,
    slot: &'static Slot,
) -> impl Iterator<Item = (&'static Entry, Cache)> {
    let (index, generation) = (slot.index(), slot.generation());
    tables.iter().filter_map(move |page| {
        let entry = &page.entries[index];
        let right = entry.generation.load(Ordering::Acquire) == generation;
        let cache = Cache::from_entry(entry.cache.load(Ordering::Relaxed));
        cache.filter(|_| right).map(|cache| (entry, cache))
    })
}

const _: () = assert!(size_of::<Caches>() <= 4096);
