//! `dcm_ctl`: one name for each number, text and setting, after mallctl(3).

use core::ffi::{c_char, c_void};

use allocator::config::{KEYS, nearest};
use allocator::{Arena, Heap, MAX_ARENAS};
use dcmalloc::process;
use serde_json::Value;

use crate::broker::configure;
use crate::error::{Error, dcm_status, status, text};
use crate::heap;

/// What can be named.
#[derive(Clone, Copy, Debug)]
pub struct Control {
    /// Its name; a part in capitals stands for many.
    pub name: &'static str,
    /// Its type, and whether it can be written.
    pub kind: &'static str,
    /// What it says or does.
    pub help: &'static str,
}

const fn control(name: &'static str, kind: &'static str, help: &'static str) -> Control {
    Control { name, kind, help }
}

/// Every name. The documentation is made from it.
pub const CONTROLS: &[Control] = &[
    control("version", "text", "the library's version"),
    control("config", "text", "the settings in effect, `key:value,…`"),
    control(
        "config.KEY",
        "text, written before the heap starts",
        "one setting",
    ),
    control(
        "broker.socket",
        "text",
        "the broker that the heap is attached to; empty: none",
    ),
    control("heap.trim", "action", "gives back what is unused"),
    control("arenas.count", "number", "arenas that the program has"),
    control("arenas.max", "number", "arenas that it may have"),
    control("arena.ID.name", "text", "the arena's name"),
    control(
        "arena.ID.allocated",
        "number",
        "bytes handed out, with what thread caches keep",
    ),
    control("arena.ID.pages", "number", "bytes of pages that it has"),
    control(
        "arena.ID.limit",
        "number",
        "bytes of pages that it may have; 2^64-1: any",
    ),
    control(
        "arena.ID.over_limit",
        "number",
        "how often the limit refused something",
    ),
    control(
        "arena.ID.purge",
        "action",
        "gives back pages in which nothing is live",
    ),
    control(
        "stats.FIELD",
        "number, text or bool (0 or 1)",
        "a number of `dcm_stats_json`, such as `stats.usage.extent_live`",
    ),
];

/// Reads, writes or does what `name` says.
///
/// A number is a `uint64_t`; `*oldlenp` is then 8. A text is written with its
/// nul, `*oldlenp` being the room for it at first and what it takes afterwards;
/// if that is more, nothing is written and `DCM_SIZE` returned. `oldp` is null where nothing is to
/// be read. A new value is text, `newlen` bytes of it with or without its nul. An action takes
/// and returns nothing.
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
    let result = || {
        // SAFETY: the caller's promise.
        let name = unsafe { text(name, "the name") }?;
        if oldp.is_null() != oldlenp.is_null() {
            return Err(Error::Null("one of oldp and oldlenp, and only one,"));
        }
        if newp.is_null() && newlen > 0 {
            return Err(Error::Null("the new value"));
        }
        // What can be read before the heap starts must not start it.
        if !newp.is_null() {
            // SAFETY: the caller's promise.
            let new = unsafe { core::slice::from_raw_parts(newp.cast::<u8>(), newlen) };
            write(name, new)?;
        }
        if newp.is_null() || !oldp.is_null() {
            let value = read(name)?;
            if !oldp.is_null() {
                // SAFETY: the caller's promise.
                unsafe { hand_out(name, &value, oldp.cast(), &mut *oldlenp) }?;
            }
        }
        Ok(())
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
        read(name)?;
        return Err(Error::ReadOnly(name.into()));
    };
    let new = new.strip_suffix(&[0]).unwrap_or(new);
    let value = str::from_utf8(new).map_err(|_| Error::Invalid("the value is not UTF-8".into()))?;
    configure(&format!("{key}:{value}"))
}

fn read(name: &str) -> Result<Value, Error> {
    let heap = heap()?;
    let value = match name.split('.').collect::<Vec<_>>()[..] {
        ["version"] => Some(env!("CARGO_PKG_VERSION").into()),
        ["config"] => Some(heap.config().to_string().into()),
        ["config", key] => heap.config().value(key).map(Value::from),
        ["broker", "socket"] => {
            let socket = process::broker().unwrap_or_default();
            Some(socket.to_string_lossy().into())
        }
        ["heap", "trim"] => Some(heap.trim().into()),
        ["arenas", "count"] => Some(Arena::count().into()),
        ["arenas", "max"] => Some(MAX_ARENAS.into()),
        ["arena", id, field] => of_arena(id, field)?,
        ["stats", ref path @ ..] if !path.is_empty() => statistic(heap, path),
        _ => None,
    };
    value.ok_or_else(|| unknown(heap, name))
}

fn of_arena(id: &str, field: &str) -> Result<Option<Value>, Error> {
    let number = id
        .parse()
        .map_err(|_| Error::Invalid(format!("`{id}` is no arena's number")))?;
    Arena::with(number, |arena| {
        let stats = arena.stats();
        Some(match field {
            "name" => arena.name().into(),
            "allocated" => stats.allocated.into(),
            "pages" => stats.pages.into(),
            "limit" => stats.limit.unwrap_or(u64::MAX).into(),
            "over_limit" => stats.over_limit.into(),
            "purge" => {
                arena.purge();
                Value::Null
            }
            _ => return None,
        })
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
    let mut names: Vec<String> = CONTROLS.iter().map(|known| known.name.into()).collect();
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
