//! SQLite's page cache in an arena, by the interface that it has for that
//! (`SQLITE_CONFIG_PCACHE2`, <https://sqlite.org/c3ref/pcache_methods2.html>).
//!
//! What the pages hold is in the arena; the table of pages, and what SQLite notes
//! about each, is in DRAM. Under pressure pages go that SQLite does not use at
//! the moment, the one that was not used for longest first. It reads them again
//! from the file when it wants them.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{c_int, c_uint, c_void};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use dcmalloc::Arena;
use dcmalloc::allocator_api2::vec::Vec as ArenaVec;
use rusqlite::ffi;

use crate::draw::Reads;

/// Where all pages are.
static ARENA: OnceLock<Arena> = OnceLock::new();
/// One for each open database.
static CACHES: Mutex<Vec<Weak<Mutex<Cache>>>> = Mutex::new(Vec::new());
/// No cache takes more than it has.
static SHRUNK: AtomicBool = AtomicBool::new(false);

/// Why SQLite did not take the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// There is one already.
    #[error("SQLite's page cache has an arena already")]
    Twice,
    /// SQLite's own words for it: `SQLITE_MISUSE` (21) once it has started.
    #[error("SQLite takes no page cache any more (code {0}): install it before the first database")]
    Refused(c_int),
}

/// One page, at an address that SQLite knows as long as it has it pinned.
#[repr(C)]
struct Page {
    /// First, so that a pointer to it is a pointer to the whole.
    known: ffi::sqlite3_pcache_page,
    key: c_uint,
    pinned: bool,
    /// When it was last used.
    turn: u64,
    bytes: ArenaVec<u64, Arena>,
    extra: Vec<u64>,
}

/// The pages of one database.
struct Cache {
    page: usize,
    extra: usize,
    /// What is not pinned may go: there is a file.
    purgeable: bool,
    most: usize,
    turn: u64,
    pages: HashMap<c_uint, NonNull<Page>>,
    /// Those that are not pinned, by turn.
    unpinned: BTreeMap<u64, c_uint>,
    hits: u64,
    misses: u64,
}

// SAFETY: pages are reached through the cache's lock, and by SQLite, which
// reaches only what it has pinned.
unsafe impl Send for Cache {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has SQLite keep all pages of all databases in `arena`. Before the first one
/// is opened.
///
/// # Errors
/// [`InstallError`]
pub fn install(arena: Arena) -> Result<(), InstallError> {
    ARENA.set(arena).map_err(|_| InstallError::Twice)?;
    // SAFETY: SQLite copies the methods, which stay for ever.
    let code = unsafe { ffi::sqlite3_config(ffi::SQLITE_CONFIG_PCACHE2, &METHODS) };
    match code {
        ffi::SQLITE_OK => Ok(()),
        code => Err(InstallError::Refused(code)),
    }
}

/// Drops pages that are not in use until `bytes` are free or none is left; how
/// many bytes that were. Caches stay as small as they are then until
/// [`may_grow`].
pub fn shrink(bytes: u64) -> u64 {
    SHRUNK.store(true, Ordering::Relaxed);
    let mut dropped = 0;
    for cache in caches() {
        let mut cache = lock(&cache);
        while dropped < bytes && cache.purgeable && cache.drop_oldest() {
            dropped += cache.page as u64;
        }
    }
    dropped
}

/// Lets caches grow again.
pub fn may_grow() {
    SHRUNK.store(false, Ordering::Relaxed);
}

/// Whether they may not.
pub fn is_shrunk() -> bool {
    SHRUNK.load(Ordering::Relaxed)
}

/// Bytes of pages that all caches have, and what came of looking for one.
pub fn held() -> (usize, Reads) {
    let mut held = (0, (0, 0));
    for cache in caches() {
        let cache = lock(&cache);
        held.0 += cache.pages.len() * cache.page;
        held.1.0 += cache.hits;
        held.1.1 += cache.misses;
    }
    held
}

fn caches() -> Vec<Arc<Mutex<Cache>>> {
    lock(&CACHES).iter().filter_map(Weak::upgrade).collect()
}

impl Cache {
    /// The page, pinned from now on. With `create` one that is not there is made.
    fn fetch(&mut self, key: c_uint, create: c_int) -> Option<NonNull<Page>> {
        self.turn += 1;
        if let Some(found) = self.pages.get(&key).copied() {
            self.hits += 1;
            self.pin(found);
            return Some(found);
        }
        if create == 0 {
            return None;
        }
        let full = self.pages.len() >= self.most || SHRUNK.load(Ordering::Relaxed);
        if self.purgeable && full && !self.drop_oldest() && create == 1 {
            // SQLite writes some back and asks again.
            return None;
        }
        self.misses += 1;
        let page = self.new_page(key).or_else(|| {
            // No memory: another page makes room, if one can go.
            (self.purgeable && self.drop_oldest()).then(|| self.new_page(key))?
        })?;
        self.pages.insert(key, page);
        Some(page)
    }

    fn new_page(&self, key: c_uint) -> Option<NonNull<Page>> {
        let words = self.page.div_ceil(8);
        let mut bytes = ArenaVec::new_in(ARENA.get()?.clone());
        bytes.try_reserve_exact(words).ok()?;
        bytes.resize(words, 0);
        let mut page = Box::new(Page {
            known: ffi::sqlite3_pcache_page {
                pBuf: bytes.as_mut_ptr().cast(),
                pExtra: ptr::null_mut(),
            },
            key,
            pinned: true,
            turn: self.turn,
            bytes,
            extra: vec![0; self.extra.div_ceil(8)],
        });
        page.known.pExtra = page.extra.as_mut_ptr().cast();
        debug_assert_eq!(page.known.pBuf, page.bytes.as_mut_ptr().cast());
        Some(NonNull::from(Box::leak(page)))
    }

    fn pin(&mut self, page: NonNull<Page>) {
        // SAFETY: in the table, so it lives; the cache is locked.
        let page = unsafe { &mut *page.as_ptr() };
        if !page.pinned {
            self.unpinned.remove(&page.turn);
            page.pinned = true;
        }
    }

    fn unpin(&mut self, page: NonNull<Page>) {
        self.turn += 1;
        // SAFETY: SQLite had it pinned, so it lives; the cache is locked.
        let page = unsafe { &mut *page.as_ptr() };
        (page.pinned, page.turn) = (false, self.turn);
        self.unpinned.insert(self.turn, page.key);
    }

    /// Drops the page that was not used for longest. `false`: all are in use.
    fn drop_oldest(&mut self) -> bool {
        match self.unpinned.pop_first() {
            Some((_, key)) => {
                self.forget(key);
                true
            }
            None => false,
        }
    }

    /// Drops a page, pinned or not.
    fn forget(&mut self, key: c_uint) {
        if let Some(page) = self.pages.remove(&key) {
            // SAFETY: leaked by `new_page`, and in the table until now.
            let page = unsafe { Box::from_raw(page.as_ptr()) };
            if !page.pinned {
                self.unpinned.remove(&page.turn);
            }
        }
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        let keys: Vec<c_uint> = self.pages.keys().copied().collect();
        keys.into_iter().for_each(|key| self.forget(key));
    }
}

const METHODS: ffi::sqlite3_pcache_methods2 = ffi::sqlite3_pcache_methods2 {
    iVersion: 1,
    pArg: ptr::null_mut(),
    xInit: Some(init),
    xShutdown: None,
    xCreate: Some(create),
    xCachesize: Some(cache_size),
    xPagecount: Some(page_count),
    xFetch: Some(fetch),
    xUnpin: Some(unpin),
    xRekey: Some(rekey),
    xTruncate: Some(truncate),
    xDestroy: Some(destroy),
    xShrink: Some(shrink_one),
};

unsafe extern "C" fn init(_: *mut c_void) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn create(
    page: c_int,
    extra: c_int,
    purgeable: c_int,
) -> *mut ffi::sqlite3_pcache {
    let cache = Arc::new(Mutex::new(Cache {
        page: page as usize,
        extra: extra as usize,
        purgeable: purgeable != 0,
        most: 0,
        turn: 0,
        pages: HashMap::new(),
        unpinned: BTreeMap::new(),
        hits: 0,
        misses: 0,
    }));
    let mut caches = lock(&CACHES);
    caches.retain(|cache| cache.strong_count() > 0);
    caches.push(Arc::downgrade(&cache));
    Arc::into_raw(cache).cast_mut().cast()
}

/// # Safety
/// `cache` is one that `create` made and that is not destroyed.
unsafe fn of<'a>(cache: *mut ffi::sqlite3_pcache) -> MutexGuard<'a, Cache> {
    // SAFETY: the caller's promise.
    lock(unsafe { &*cache.cast::<Mutex<Cache>>() })
}

fn known(page: Option<NonNull<Page>>) -> *mut ffi::sqlite3_pcache_page {
    page.map_or(ptr::null_mut(), |page| page.as_ptr().cast())
}

unsafe extern "C" fn cache_size(cache: *mut ffi::sqlite3_pcache, most: c_int) {
    // SAFETY: SQLite passes what `create` made, here and below.
    unsafe { of(cache) }.most = most.max(0) as usize;
}

unsafe extern "C" fn page_count(cache: *mut ffi::sqlite3_pcache) -> c_int {
    // SAFETY: as in `cache_size`.
    unsafe { of(cache) }.pages.len() as c_int
}

unsafe extern "C" fn fetch(
    cache: *mut ffi::sqlite3_pcache,
    key: c_uint,
    create: c_int,
) -> *mut ffi::sqlite3_pcache_page {
    // SAFETY: as in `cache_size`.
    known(unsafe { of(cache) }.fetch(key, create))
}

unsafe extern "C" fn unpin(
    cache: *mut ffi::sqlite3_pcache,
    page: *mut ffi::sqlite3_pcache_page,
    discard: c_int,
) {
    // SAFETY: as in `cache_size`.
    let mut cache = unsafe { of(cache) };
    if let Some(page) = NonNull::new(page.cast::<Page>()) {
        cache.unpin(page);
        if discard != 0 {
            // SAFETY: it has just been unpinned, so it lives.
            cache.forget(unsafe { page.as_ref() }.key);
        }
    }
}

unsafe extern "C" fn rekey(
    cache: *mut ffi::sqlite3_pcache,
    page: *mut ffi::sqlite3_pcache_page,
    old: c_uint,
    new: c_uint,
) {
    // SAFETY: as in `cache_size`.
    let mut cache = unsafe { of(cache) };
    cache.forget(new);
    if let Some(mut moved) = NonNull::new(page.cast::<Page>()) {
        cache.pages.remove(&old);
        // SAFETY: SQLite has it pinned, so it lives; the cache is locked.
        unsafe { moved.as_mut() }.key = new;
        cache.pages.insert(new, moved);
    }
}

unsafe extern "C" fn truncate(cache: *mut ffi::sqlite3_pcache, limit: c_uint) {
    // SAFETY: as in `cache_size`.
    let mut cache = unsafe { of(cache) };
    let keys = cache.pages.keys().copied().filter(|key| *key >= limit);
    let keys: Vec<c_uint> = keys.collect();
    keys.into_iter().for_each(|key| cache.forget(key));
}

unsafe extern "C" fn destroy(cache: *mut ffi::sqlite3_pcache) {
    // SAFETY: `create` made it, and SQLite gives it up now.
    drop(unsafe { Arc::from_raw(cache.cast::<Mutex<Cache>>()) });
}

unsafe extern "C" fn shrink_one(cache: *mut ffi::sqlite3_pcache) {
    // SAFETY: as in `cache_size`.
    let mut cache = unsafe { of(cache) };
    while cache.drop_oldest() {}
}
