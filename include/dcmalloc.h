/*
 * dcmalloc: memory that can be taken back while it is in use.
 *
 * Made from ffi/c by `cargo xtask header`.
 */

#ifndef DCMALLOC_H
#define DCMALLOC_H

#include <stddef.h>
#include <stdint.h>

/*
 What a call came to. `dcm_last_error` says more.
 */
typedef enum dcm_status {
  /*
   Done.
   */
  DCM_OK = 0,
  /*
   An argument can't be meant: a null pointer, an alignment that is no
   power of two, a size that overflows, a setting that is none.
   */
  DCM_INVALID = 1,
  /*
   No memory within the limits that hold.
   */
  DCM_NO_MEMORY = 2,
  /*
   There is no such arena: it has ended, or never was.
   */
  DCM_NO_ARENA = 3,
  /*
   The memory is not of an arena of this library.
   */
  DCM_FOREIGN = 4,
  /*
   Nothing has that name.
   */
  DCM_UNKNOWN = 5,
  /*
   It can be read only, or only be set before the heap has started.
   */
  DCM_READ_ONLY = 6,
  /*
   The value has another size.
   */
  DCM_SIZE = 7,
  /*
   There are as many as there can be.
   */
  DCM_TOO_MANY = 8,
  /*
   No broker, or it refused.
   */
  DCM_BROKER = 9,
  /*
   Another copy of the library serves this process.
   */
  DCM_SECOND_COPY = 10,
  /*
   The system refused a thread or addresses.
   */
  DCM_SYSTEM = 11,
  /*
   There is no such pin: it has ended, or never was.
   */
  DCM_NO_PIN = 12,
  /*
   There is no shared capacity with this tag, or none is mapped there.
   */
  DCM_NO_TAG = 13,
} dcm_status;

/*
 Extents are recalled, and what is unused is not enough.
 */
typedef struct dcm_pressure {
  /*
   Bytes that are still missing.
   */
  uint64_t bytes;
  /*
   For how many milliseconds dropping is of use; what is live then is moved.
   */
  uint64_t within_ms;
} dcm_pressure;

/*
 Called under pressure, on a thread of the library's, one callback at a time:
 time to free what can be made again. It may allocate, free and block; no
 exception may leave it. Anything but 0 says that it failed, and is counted
 (`stats.callback_panics`).
 */
typedef int (*dcm_pressure_fn)(void *context, const struct dcm_pressure *pressure);

/*
 Content of an arena was lost: a device took its memory by force, or found
 it broken.
 */
typedef struct dcm_lost {
  /*
   Bytes that read as zeroes now, since the last call.
   */
  uint64_t bytes;
} dcm_lost;

/*
 Called when content was lost; as `dcm_pressure_fn`. With this, what is lost
 reads as zeroes; without it, touching it raises SIGBUS, unless the setting
 `on_lost` says otherwise.
 */
typedef int (*dcm_lost_fn)(void *context, const struct dcm_lost *lost);

/*
 What an arena is to be. All zero but `struct_size` is an arena with
 everything on extents and no limit.
 */
typedef struct dcm_arena_params {
  /*
   `sizeof(struct dcm_arena_params)`.
   */
  size_t struct_size;
  /*
   For people, at most 32 bytes; null: none.
   */
  const char *name;
  /*
   Where allocations go, as the setting `placement` has it: `dc`, `dram`,
   `size=64K`; null: `dc`.
   */
  const char *placement;
  /*
   What happens when no extent is left, as the setting `on_exhausted` has
   it: `dram`, `fail`, `wait=MS`; null: what the heap does.
   */
  const char *on_exhausted;
  /*
   Bytes of pages that it may have; 0: any.
   */
  uint64_t limit;
  /*
   When extents are recalled, callbacks of low priority are called first.
   */
  int32_t priority;
  /*
   Called under pressure; null: not at all.
   */
  dcm_pressure_fn on_pressure;
  /*
   Called when content was lost; null: not at all.
   */
  dcm_lost_fn on_lost;
  /*
   Passed to the callbacks.
   */
  void *context;
  /*
   Its extents are those with this tag, a UUID, and no others; null: those
   without a tag.
   */
  const char *tag;
} dcm_arena_params;

/*
 An arena: a number that no other arena of the process has or will have.
 */
typedef uint64_t dcm_arena;

/*
 A pin: a number that no other pin of the process has or will have.
 */
typedef uint64_t dcm_pin_id;

/*
 No arena.
 */
#define DCM_NO_ARENA_ID 0

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 Makes an arena and writes its number to `arena`. `params` may be null.

 The heap has started then, from its settings; see `dcm_configure`.

 Required:
 `params` is null or has as many bytes as its `struct_size` says, its texts
 end with a nul, and its callbacks stay until `dcm_arena_destroy` has returned.
 */
enum dcm_status dcm_arena_create(const struct dcm_arena_params *params, dcm_arena *arena);

/*
 Ends an arena and frees all that was allocated from it, at once. A callback
 of it that runs is waited for, unless it is the caller.

 `DCM_NO_ARENA`: it has been ended before, and nothing was done.

 Required:
 No other thread uses the arena or memory of it.
 */
enum dcm_status dcm_arena_destroy(dcm_arena arena);

/*
 Says `conf`, `key:value,…`, before the heap starts. It starts with the first
 call that makes, attaches, pins, opens, gives back or reads something, and
 under the preloaded library before `main`. What is said holds over
 `DCMALLOC_CONF` and the configuration file. One setting that is wrong makes
 all of it be refused.

 Required:
 `conf` is null or a string that ends with a nul.
 */
enum dcm_status dcm_configure(const char *conf);

/*
 Connects to the broker that listens at `socket`, or at null to that of
 `DCM_SOCKET` or of the machine. Without this the heap does so when it starts,
 unless `placement` is `dram`, and stays in DRAM where that fails. The heap
 stays with the broker that it found first.

 Required:
 `socket` is null or a string that ends with a nul.
 */
enum dcm_status dcm_attach(const char *socket);

/*
 Gives back what is unused; 1 if there was something.
 */
int dcm_trim(void);

/*
 Has the broker give `bytes` back to the device, as `dcm release` does: from
 whoever has them, this process included. Returns when there is a receipt,
 after about `deadline_ms` at the latest; `dcm_receipt_json` has it. That less came
 back than was asked for is no error, and in the receipt.
 */
enum dcm_status dcm_release(uint64_t bytes, uint64_t deadline_ms);

/*
 Writes the receipt of the last `dcm_release` as JSON and a nul, as far as
 `size` bytes go; returns its length without the nul, as snprintf(3) does.

 Required:
 `size` bytes can be written at `buffer`, which may be null if `size` is 0.
 */
size_t dcm_receipt_json(char *buffer, size_t size);

/*
 Writes what the heap holds as JSON and a nul; as `dcm_receipt_json`. The
 same numbers are under `stats.` of `dcm_ctl`.

 Required:
 As `dcm_receipt_json`.
 */
size_t dcm_stats_json(char *buffer, size_t size);

/*
 Reads, writes or does what `name` says.

 - `version`: text, the library's version
 - `config`: text, the settings in effect, `key:value,…`
 - `config.KEY`: text, one setting; can be written before the heap starts
 - `broker.socket`: text, the broker that the heap is attached to; empty: none
 - `heap.trim`: action, gives back what is unused
 - `arenas.count`: number, arenas that the program has
 - `arenas.max`: number, arenas that it may have
 - `arena.ID.name`: text, the name of the arena with that number
 - `arena.ID.allocated`: number, bytes handed out, with what thread caches keep
 - `arena.ID.pages`: number, bytes of pages that it has
 - `arena.ID.limit`: number, bytes of pages that it may have; 2^64-1: any
 - `arena.ID.over_limit`: number, how often the limit refused something
 - `arena.ID.lost`: number, bytes whose content was lost and reads as zeroes
 - `arena.ID.purge`: action, gives back pages in which nothing is live
 - `stats.FIELD`: number, text or 0 and 1, a field of `dcm_stats_json`, such as
   `stats.usage.extent_live`

 A number is a `uint64_t`; `*oldlenp` is then 8. A text is written with its
 nul, `*oldlenp` being the room for it at first and what it takes afterwards;
 if that is more, nothing is written and `DCM_SIZE` returned. `oldp` is null where nothing is to
 be read. A new value is text, `newlen` bytes of it with or without its nul; what takes none is
 refused with `DCM_READ_ONLY`. An action takes and returns nothing: with an `oldp` it is refused
 with `DCM_INVALID`, and not done.

 Required:
 `name` is a string; `*oldlenp` bytes can be written at `oldp`, `newlen`
 bytes read at `newp`; a null pointer is either not given or refused.
 */
enum dcm_status dcm_ctl(const char *name,
                        void *oldp,
                        size_t *oldlenp,
                        const void *newp,
                        size_t newlen);

/*
 What a status means, in a few words; a static string, never null.
 */
const char *dcm_strerror(int status);

/*
 What the calling thread's last call that failed refused, why, and what to
 do; empty if none has. Valid until the thread's next call that fails.
 */
const char *dcm_last_error(void);

/*
 `size` bytes from `arena`, aligned as malloc(3) does. A size of 0 is served
 as 1. Null, with errno ENOMEM or EINVAL, if there is no memory within the
 arena's limit or no such arena.
 */
void *dcm_malloc(dcm_arena arena, size_t size);

/*
 `count` times `size` bytes, all zero; as `dcm_malloc`.
 */
void *dcm_calloc(dcm_arena arena, size_t count, size_t size);

/*
 `size` bytes at a multiple of `align`, which is a power of two; as
 `dcm_malloc`. It lies where the arena's placement says, also when aligned as
 for direct I/O: pin what a device works on.
 */
void *dcm_aligned_alloc(dcm_arena arena, size_t align, size_t size);

/*
 Gives memory of `arena` another size, perhaps at another address. A null
 `ptr` is as `dcm_malloc`; a size of 0 is served as 1. Null if that can't be
 done, and then the memory is as it was.

 Required:
 `ptr` is null, or live and from this library; what is of no arena of it is
 refused.
 */
void *dcm_realloc(dcm_arena arena, void *ptr, size_t size);

/*
 Frees memory of any arena. Null is fine. `DCM_FOREIGN`: it is none of an
 arena's that lives, and nothing was done.

 Required:
 `ptr` is null, or from this library and not freed yet.
 */
enum dcm_status dcm_free(void *ptr);

/*
 Bytes that may be used at `ptr`, at least what was asked for; 0 for null and
 for what is of no arena.

 Required:
 `ptr` is null, or from this library and not freed yet.
 */
size_t dcm_usable_size(const void *ptr);

/*
 The arena that an address lies in; `DCM_NO_ARENA_ID`: none.
 */
dcm_arena dcm_arena_of(const void *ptr);

/*
 Keeps `len` bytes at `ptr` where they are until `dcm_unpin`: they are not
 moved, spilled or given back, as it must be while a device reads or writes
 them by itself. They may be of any arena, or of the preloaded malloc. Pins
 are counted for each 2 MiB, and may overlap. Waits for a move that is under way.

 `DCM_FOREIGN`: not all of it is in use in this heap.

 Required:
 `pin` can be written.
 */
enum dcm_status dcm_pin(const void *ptr, size_t len, dcm_pin_id *pin);

/*
 Ends a pin. `DCM_NO_PIN`: it has ended before, and nothing was done.
 */
enum dcm_status dcm_unpin(dcm_pin_id pin);

/*
 Maps the capacity that the fabric manager has given several hosts under
 `tag`, a UUID: all of its extents or none, in the order of their sequence
 numbers, read-only. `data` is where it is, `size` how many bytes. Until
 `dcm_close_shared` a release of it is refused by name, as of a pin.

 Nobody may write it meanwhile, on this host or another: who fills it says
 when it is done.

 `DCM_NO_TAG`: there is no capacity with this tag here, or it is not shared.

 Required:
 `tag` is null or a string that ends with a nul; `data` and `size` are null
 or can be written.
 */
enum dcm_status dcm_open_shared(const char *tag, const void **data, size_t *size);

/*
 Unmaps what `dcm_open_shared` mapped at `data`; null does nothing.

 `DCM_NO_TAG`: nothing is open there; it has been closed, or never was.

 Required:
 No thread reads it any more.
 */
enum dcm_status dcm_close_shared(const void *data);

/*
 Whether the device has taken what is open at `data` by force: what is read
 since then means nothing. 1 if so, 0 if not or if nothing is open there.
 */
int dcm_shared_is_lost(const void *data);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* DCMALLOC_H */
