//! Allocations in arenas.

use core::ffi::c_void;

use allocator::{Arena, engine};
use dcmalloc::process::HEAP;

use crate::arena::{DCM_NO_ARENA_ID, dcm_arena};
use crate::error::{Error, dcm_status, pointer, status};

/// No alignment of its own: blocks of 16 bytes and more are aligned to 16.
const NATURAL: usize = 1;

fn allocate(arena: dcm_arena, size: usize, align: usize, zero: bool) -> Result<*mut u8, Error> {
    let ptr = Arena::with(arena, |arena| arena.allocate_bytes(size, align, zero))
        .ok_or(Error::NoArena(arena))?;
    if ptr.is_null() {
        return Err(Error::NoMemory(size));
    }
    Ok(ptr)
}

/// Calls `f` with the arena that `ptr` was allocated from.
fn in_owner<T>(ptr: *const c_void, f: impl FnOnce(&Arena) -> T) -> Result<T, Error> {
    let foreign = Error::Foreign(ptr.addr());
    if !ptr.addr().is_multiple_of(size_of::<usize>()) {
        return Err(foreign);
    }
    let owner = Arena::with_owner_of(&HEAP, ptr.addr(), Arena::id);
    owner.and_then(|id| Arena::with(id, f)).ok_or(foreign)
}

/// `size` bytes from `arena`, aligned as malloc(3) does. A size of 0 is served
/// as 1. Null, with errno ENOMEM or EINVAL, if there is no memory within the
/// arena's limit or no such arena.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_malloc(arena: dcm_arena, size: usize) -> *mut c_void {
    pointer(allocate(arena, size, NATURAL, false))
}

/// `count` times `size` bytes, all zero; as `dcm_malloc`.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_calloc(arena: dcm_arena, count: usize, size: usize) -> *mut c_void {
    let overflow = || Error::Invalid(format!("{count} times {size} bytes is more than there is"));
    let total = count.checked_mul(size).ok_or_else(overflow);
    pointer(total.and_then(|total| allocate(arena, total, NATURAL, true)))
}

/// `size` bytes at a multiple of `align`, which is a power of two; as
/// `dcm_malloc`. It lies where the arena's placement says, also when aligned as
/// for direct I/O: pin what a device works on.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_aligned_alloc(arena: dcm_arena, align: usize, size: usize) -> *mut c_void {
    if !align.is_power_of_two() {
        return pointer(Err(Error::Invalid(format!(
            "an alignment of {align} is no power of two"
        ))));
    }
    pointer(allocate(arena, size, align, false))
}

/// Gives memory of `arena` another size, perhaps at another address. A null
/// `ptr` is as `dcm_malloc`; a size of 0 is served as 1. Null if that can't be
/// done, and then the memory is as it was.
///
/// # Safety
/// `ptr` is null, or live and from this library; what is of no arena of it is
/// refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_realloc(
    arena: dcm_arena,
    ptr: *mut c_void,
    size: usize,
) -> *mut c_void {
    if ptr.is_null() {
        return dcm_malloc(arena, size);
    }
    let resize = |owner: &Arena| {
        if owner.id() != arena {
            return Err(match Arena::with(arena, |_| ()) {
                None => Error::NoArena(arena),
                Some(()) => Error::OtherArena {
                    ptr: ptr.addr(),
                    owner: owner.id(),
                    arena,
                },
            });
        }
        // SAFETY: the caller's promise, and it is of this arena.
        let resized = unsafe { owner.reallocate_bytes(ptr.cast(), size, NATURAL) };
        match resized.is_null() {
            true => Err(Error::NoMemory(size)),
            false => Ok(resized),
        }
    };
    pointer(in_owner(ptr, resize).flatten())
}

/// Frees memory of any arena. Null is fine. `DCM_FOREIGN`: it is none of an
/// arena's that lives, and nothing was done.
///
/// # Safety
/// `ptr` is null, or from this library and not freed yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_free(ptr: *mut c_void) -> dcm_status {
    if ptr.is_null() {
        return dcm_status::DCM_OK;
    }
    status(in_owner(ptr, |arena| {
        // SAFETY: the caller's promise; the usable size has the same class.
        unsafe { arena.free_bytes(ptr.cast(), engine::usable_size(ptr.cast()), NATURAL) }
    }))
}

/// Bytes that may be used at `ptr`, at least what was asked for; 0 for null and
/// for what is of no arena.
///
/// # Safety
/// `ptr` is null, or from this library and not freed yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_usable_size(ptr: *const c_void) -> usize {
    // SAFETY: the caller's promise, and an arena has it.
    let size = in_owner(ptr, |_| unsafe { engine::usable_size(ptr.cast()) });
    size.unwrap_or(0)
}

/// The arena that an address lies in; `DCM_NO_ARENA_ID`: none.
#[unsafe(no_mangle)]
pub extern "C" fn dcm_arena_of(ptr: *const c_void) -> dcm_arena {
    let id = Arena::with_owner_of(&HEAP, ptr.addr(), Arena::id);
    id.and_then(|id| Arena::with(id, Arena::id))
        .unwrap_or(DCM_NO_ARENA_ID)
}
