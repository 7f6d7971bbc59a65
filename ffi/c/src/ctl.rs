//! `dcm_ctl`: one name for each number, text and setting, after mallctl(3).

use core::ffi::{c_char, c_void};

use allocator::config::{KEYS, nearest};
use allocator::{Arena, Heap, MAX_ARENAS};
use dcmalloc::process;
use serde_json::Value;

use crate::broker::configure;
use crate::error::{Error, dcm_status, status, text};
use crate::heap;

/// Every name; a part in capitals stands for many.
const CONTROLS: &[&str] = &[
    "version",
    "config",
    "config.KEY",
    "broker.socket",
    "heap.trim",
    "arenas.count",
    "arenas.max",
    "arena.ID.name",
    "arena.ID.allocated",
    "arena.ID.pages",
    "arena.ID.limit",
    "arena.ID.over_limit",
    "arena.ID.lost",
    "arena.ID.purge",
    "stats.FIELD",
];

/// What a name stands for.
enum Named {
    Value(Value),
    /// `heap.trim`.
    Trim,
    /// `arena.ID.purge`, of that arena.
    Purge(u64),
}

/// Reads, writes or does what `name` says.
///
/// - `version`: text, the library's version
/// - `config`: text, the settings in effect, `key:value,…`
/// - `config.KEY`: text, one setting; can be written before the heap starts
/// - `broker.socket`: text, the broker that the heap is attached to; empty: none
/// - `heap.trim`: action, gives back what is unused
/// - `arenas.count`: number, arenas that the program has
/// - `arenas.max`: number, arenas that it may have
/// - `arena.ID.name`: text, the name of the arena with that number
/// - `arena.ID.allocated`: number, bytes handed out, with what thread caches keep
/// - `arena.ID.pages`: number, bytes of pages that it has
/// - `arena.ID.limit`: number, bytes of pages that it may have; 2^64-1: any
/// - `arena.ID.over_limit`: number, how often the limit refused something
/// - `arena.ID.lost`: number, bytes whose content was lost and reads as zeroes
/// - `arena.ID.purge`: action, gives back pages in which nothing is live
/// - `stats.FIELD`: number, text or 0 and 1, a field of `dcm_stats_json`, such as
///   `stats.usage.extent_live`
///
/// A number is a `uint64_t`; `*oldlenp` is then 8. A text is written with its
/// nul, `*oldlenp` being the room for it at first and what it takes afterwards;
/// if that is more, nothing is written and `DCM_SIZE` returned. `oldp` is null where nothing is to
/// be read. A new value is text, `newlen` bytes of it with or without its nul; what takes none is
/// refused with `DCM_READ_ONLY`. An action takes and returns nothing: with an `oldp` it is refused
/// with `DCM_INVALID`, and not done.
///
/// # Safety
/// `name` is a string; `*oldlenp` bytes can be written at `oldp`, `newlen`
/// bytes read at `newp`; a null pointer is either not given or refused.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dcm_ctl(
    name: *const c_char,
    oldp: *mut c_void,
    oldlenp: *mut usize,
    newp: *const c_void,
    newlen: usize,
) -> dcm_status {
    let result = || -> Result<(), Error> {
        // SAFETY: the caller's promise.
        let name = unsafe { text(name, "the name") }?;
        if oldp.is_null() != oldlenp.is_null() {
            return Err(Error::Null("one of oldp and oldlenp, and only one,"));
        }
        if newp.is_null() && newlen > 0 {
            return Err(Error::Null("the new value"));
        }
        // First: whatever is looked up starts the heap, and a setting is written before that.
        if !newp.is_null() {
            // SAFETY: the caller's promise.
            let new = unsafe { core::slice::from_raw_parts(newp.cast::<u8>(), newlen) };
            write(name, new)?;
            if oldp.is_null() {
                return Ok(());
            }
        }
        match look_up(name)? {
            Named::Value(_) if oldp.is_null() => Ok(()),
            Named::Value(value) => {
                // SAFETY: the caller's promise.
                unsafe { hand_out(name, &value, oldp.cast(), &mut *oldlenp) }
            }
            _ if !oldp.is_null() => Err(Error::Invalid(format!(
                "`{name}` gives no value: pass a null oldp"
            ))),
            Named::Trim => {
                heap()?.trim();
                Ok(())
            }
            Named::Purge(arena) => Arena::with(arena, Arena::purge).ok_or(Error::NoArena(arena)),
        }
    };
    status(result())
}

/// # Safety
/// `room` bytes can be written at `place`.
unsafe fn hand_out(
    name: &str,
    value: &Value,
    place: *mut u8,
    room: &mut usize,
) -> Result<(), Error> {
    let bytes = match value {
        Value::String(text) => [text.as_bytes(), &[0]].concat(),
        Value::Bool(flag) => u64::from(*flag).to_ne_bytes().to_vec(),
        value => value.as_u64().unwrap_or_default().to_ne_bytes().to_vec(),
    };
    let (needed, given) = (bytes.len(), *room);
    let fits = match value {
        Value::String(_) => needed <= given,
        _ => needed == given,
    };
    *room = needed;
    if !fits {
        return Err(Error::Size {
            name: name.into(),
            needed,
            given,
        });
    }
    // SAFETY: the caller's promise.
    unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), needed) };
    Ok(())
}

fn write(name: &str, new: &[u8]) -> Result<(), Error> {
    let Some(key) = name.strip_prefix("config.") else {
        look_up(name)?;
        return Err(Error::ReadOnly(name.into()));
    };
    let new = new.strip_suffix(&[0]).unwrap_or(new);
    let value = str::from_utf8(new).map_err(|_| Error::Invalid("the value is not UTF-8".into()))?;
    configure(&format!("{key}:{value}"))
}

/// Does nothing of what it finds.
fn look_up(name: &str) -> Result<Named, Error> {
    let heap = heap()?;
    let value = match name.split('.').collect::<Vec<_>>()[..] {
        ["version"] => Some(env!("CARGO_PKG_VERSION").into()),
        ["config"] => Some(heap.config().to_string().into()),
        ["config", key] => heap.config().value(key).map(Value::from),
        ["broker", "socket"] => {
            let socket = process::broker().unwrap_or_default();
            Some(socket.to_string_lossy().into())
        }
        ["heap", "trim"] => return Ok(Named::Trim),
        ["arenas", "count"] => Some(Arena::count().into()),
        ["arenas", "max"] => Some(MAX_ARENAS.into()),
        ["arena", id, field] => {
            let named = of_arena(id, field)?;
            return named.ok_or_else(|| unknown(heap, name));
        }
        ["stats", ref path @ ..] if !path.is_empty() => statistic(heap, path),
        _ => None,
    };
    value.map(Named::Value).ok_or_else(|| unknown(heap, name))
}

fn of_arena(id: &str, field: &str) -> Result<Option<Named>, Error> {
    let number = id
        .parse()
        .map_err(|_| Error::Invalid(format!("`{id}` is no arena's number")))?;
    Arena::with(number, |arena| {
        let stats = arena.stats();
        let value: Value = match field {
            "name" => arena.name().into(),
            "allocated" => stats.allocated.into(),
            "pages" => stats.pages.into(),
            "limit" => stats.limit.unwrap_or(u64::MAX).into(),
            "over_limit" => stats.over_limit.into(),
            "lost" => stats.lost.into(),
            "purge" => return Some(Named::Purge(number)),
            _ => return None,
        };
        Some(Named::Value(value))
    })
    .ok_or(Error::NoArena(number))
}

fn statistic(heap: &'static Heap, path: &[&str]) -> Option<Value> {
    let stats = serde_json::to_value(heap.stats()).ok()?;
    let mut at = &stats;
    for step in path {
        at = match at {
            Value::Array(list) => list.get(step.parse::<usize>().ok()?)?,
            at => at.get(step)?,
        };
    }
    (!at.is_object() && !at.is_array()).then(|| at.clone())
}

fn unknown(heap: &'static Heap, name: &str) -> Error {
    let mut names: Vec<String> = CONTROLS.iter().map(|known| (*known).into()).collect();
    names.extend(KEYS.iter().map(|key| format!("config.{}", key.name)));
    if let Ok(Value::Object(stats)) = serde_json::to_value(heap.stats()) {
        for (field, value) in &stats {
            names.push(format!("stats.{field}"));
            let parts = value.as_object().into_iter().flatten();
            names.extend(parts.map(|(part, _)| format!("stats.{field}.{part}")));
        }
    }
    let nearest = nearest(name, names.iter().map(String::as_str));
    Error::Unknown {
        name: name.into(),
        nearest: nearest.unwrap_or_default().into(),
    }
}
