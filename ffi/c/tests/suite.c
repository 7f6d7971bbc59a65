/* The C face: see behaviours.txt. */
#include <dcmalloc.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "suite.h"

#define MIB ((size_t)1 << 20)

static uint64_t number(const char *name)
{
    uint64_t value = 0;
    size_t size = sizeof value;
    CHECK(dcm_ctl(name, &value, &size, NULL, 0) == DCM_OK);
    return value;
}

static uint64_t number_of(dcm_arena arena, const char *field)
{
    char name[64];
    snprintf(name, sizeof name, "arena.%llu.%s", (unsigned long long)arena, field);
    return number(name);
}

static int attached(void)
{
    char socket[256] = "";
    size_t size = sizeof socket;
    CHECK(dcm_ctl("broker.socket", socket, &size, NULL, 0) == DCM_OK);
    if (!socket[0])
        skipped_because = "no broker";
    return socket[0] != 0;
}

static dcm_arena plain(void)
{
    dcm_arena arena = DCM_NO_ARENA_ID;
    CHECK(dcm_arena_create(NULL, &arena) == DCM_OK);
    return arena;
}

static int holds(const unsigned char *bytes, size_t size, unsigned char value)
{
    for (size_t i = 0; i < size; i++)
        if (bytes[i] != value)
            return 0;
    return 1;
}

static void arena_is_made_and_ended(void)
{
    uint64_t before = number("arenas.count");
    struct dcm_arena_params params = {.struct_size = sizeof params, .name = "index"};
    dcm_arena arena;
    CHECK(dcm_arena_create(&params, &arena) == DCM_OK);
    CHECK(number("arenas.count") == before + 1);
    char name[32];
    char text[8];
    size_t size = sizeof text;
    snprintf(name, sizeof name, "arena.%llu.name", (unsigned long long)arena);
    CHECK(dcm_ctl(name, text, &size, NULL, 0) == DCM_OK && !strcmp(text, "index"));
    CHECK(dcm_malloc(arena, 100000) != NULL);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
    CHECK(number("arenas.count") == before);
}

static void blocks_hold_what_is_written(void)
{
    enum { COUNT = 200 };
    dcm_arena arena = plain();
    unsigned char *blocks[COUNT];
    for (size_t i = 0; i < COUNT; i++) {
        blocks[i] = dcm_malloc(arena, i * i + 1);
        CHECK(blocks[i] && dcm_usable_size(blocks[i]) >= i * i + 1);
        memset(blocks[i], (int)i, i * i + 1);
    }
    for (size_t i = 0; i < COUNT; i++) {
        CHECK(holds(blocks[i], i * i + 1, (unsigned char)i));
        CHECK(dcm_free(blocks[i]) == DCM_OK);
    }
    CHECK(dcm_free(NULL) == DCM_OK);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

static void blocks_are_aligned_and_zeroed(void)
{
    dcm_arena arena = plain();
    for (size_t align = 1; align <= 4 * MIB; align *= 4) {
        char *block = dcm_aligned_alloc(arena, align, 100);
        CHECK(block && (uintptr_t)block % align == 0);
        CHECK(dcm_free(block) == DCM_OK);
    }
    for (size_t size = 10; size < 4 * MIB; size *= 7) {
        unsigned char *block = dcm_malloc(arena, size);
        CHECK(block);
        memset(block, 7, size);
        CHECK(dcm_free(block) == DCM_OK);
        block = dcm_calloc(arena, 1, size);
        CHECK(block && holds(block, size, 0));
        CHECK(dcm_free(block) == DCM_OK);
    }
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

static void resizing_keeps_content(void)
{
    dcm_arena arena = plain();
    unsigned char *block = dcm_realloc(arena, NULL, 10);
    size_t had = 10;
    memset(block, 3, had);
    for (size_t size = 100; size < 8 * MIB; size *= 9) {
        block = dcm_realloc(arena, block, size);
        CHECK(block && holds(block, had, 3));
        memset(block, 3, size);
        had = size;
    }
    block = dcm_realloc(arena, block, 50);
    CHECK(block && holds(block, 50, 3));
    CHECK(dcm_free(block) == DCM_OK);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

static void *free_all(void *blocks)
{
    for (void **block = blocks; *block; block++)
        if (dcm_free(*block) != DCM_OK)
            return blocks;
    return NULL;
}

static void other_threads_free(void)
{
    enum { COUNT = 2000 };
    static void *blocks[COUNT + 1];
    dcm_arena arena = plain();
    for (size_t i = 0; i < COUNT; i++)
        CHECK((blocks[i] = dcm_malloc(arena, 1 + i)) != NULL);
    pthread_t thread;
    void *failed = blocks;
    CHECK(pthread_create(&thread, NULL, free_all, blocks) == 0);
    CHECK(pthread_join(thread, &failed) == 0 && !failed);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

static void limit_refuses_and_has_room_again(void)
{
    struct dcm_arena_params params = {.struct_size = sizeof params, .limit = 8 * MIB};
    dcm_arena arena;
    void *blocks[100];
    size_t count = 0;
    CHECK(dcm_arena_create(&params, &arena) == DCM_OK);
    errno = 0;
    while (count < 100 && (blocks[count] = dcm_malloc(arena, 100000)))
        count++;
    CHECK(count >= 70 && count < 100 && errno == ENOMEM);
    CHECK(strstr(dcm_last_error(), "100000"));
    CHECK(number_of(arena, "pages") <= 8 * MIB && number_of(arena, "over_limit") > 0);
    while (count > 0)
        CHECK(dcm_free(blocks[--count]) == DCM_OK);
    CHECK(dcm_malloc(arena, 7 * MIB) != NULL);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

static void too_large_is_refused(void)
{
    dcm_arena arena = plain();
    volatile size_t most = SIZE_MAX;
    CHECK(!dcm_malloc(arena, most));
    CHECK(!dcm_malloc(arena, most / 2));
    CHECK(!dcm_malloc(arena, (size_t)1 << 40));
    CHECK(!dcm_aligned_alloc(arena, 4096, most - 4096));
    unsigned char *block = dcm_malloc(arena, 10);
    memset(block, 1, 10);
    CHECK(!dcm_realloc(arena, block, most) && holds(block, 10, 1));
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

static void foreign_memory_is_told_apart(void)
{
    dcm_arena arena = plain(), other = plain();
    int here;
    char *theirs = malloc(100);
    char *ours = dcm_malloc(arena, 100);
    CHECK(dcm_arena_of(ours) == arena);
    CHECK(dcm_arena_of(&here) == DCM_NO_ARENA_ID && dcm_arena_of(theirs) == DCM_NO_ARENA_ID);
    CHECK(dcm_free(&here) == DCM_FOREIGN && dcm_free(theirs) == DCM_FOREIGN);
    CHECK(strstr(dcm_last_error(), "another allocator's"));
    CHECK(!dcm_realloc(arena, theirs, 200) && !dcm_realloc(other, ours, 200));
    CHECK(dcm_usable_size(theirs) == 0 && dcm_usable_size(ours) >= 100);
    free(theirs);
    CHECK(dcm_arena_destroy(arena) == DCM_OK && dcm_arena_destroy(other) == DCM_OK);
}

static void ended_arena_is_told_apart(void)
{
    dcm_arena arena = plain();
    void *block = dcm_malloc(arena, 100000);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
    CHECK(dcm_arena_destroy(arena) == DCM_NO_ARENA);
    errno = 0;
    CHECK(!dcm_malloc(arena, 10) && errno == EINVAL);
    CHECK(strstr(dcm_last_error(), "has ended"));
    dcm_arena next = plain();
    CHECK(next != arena && dcm_arena_of(block) != arena);
    CHECK(dcm_arena_destroy(next) == DCM_OK);
}

static void arenas_that_cannot_be_are_refused(void)
{
    uint64_t before = number("arenas.count");
    dcm_arena arena;
    struct dcm_arena_params params = {
        .struct_size = sizeof params, .name = "a name of more than thirty-two bytes"};
    CHECK(dcm_arena_create(&params, &arena) == DCM_INVALID);
    CHECK(strstr(dcm_last_error(), "32"));
    params.name = NULL;
    params.placement = "interleave=2";
    CHECK(dcm_arena_create(&params, &arena) == DCM_INVALID);
    params.placement = NULL;
    uint64_t made = 0;
    static dcm_arena all[4096];
    while (made < 4096 && dcm_arena_create(&params, &all[made]) == DCM_OK)
        made++;
    CHECK(before + made == number("arenas.max"));
    CHECK(dcm_arena_create(&params, &arena) == DCM_TOO_MANY);
    while (made > 0)
        CHECK(dcm_arena_destroy(all[--made]) == DCM_OK);
    CHECK(number("arenas.count") == before);
}

static void settings_that_are_none_are_named(void)
{
    CHECK(dcm_configure("placment:dc") == DCM_INVALID);
    CHECK(strstr(dcm_last_error(), "did you mean `placement`?"));
    CHECK(dcm_configure("placement:moon") == DCM_INVALID);
    CHECK(strstr(dcm_last_error(), "moon"));
}

static void statistics_count(void)
{
    dcm_arena arena = plain();
    uint64_t before = number("stats.allocated"), arenas = number("stats.arenas");
    CHECK(dcm_malloc(arena, 10 * MIB) != NULL);
    CHECK(number("stats.allocated") >= before + 10 * MIB);
    CHECK(number_of(arena, "allocated") >= 10 * MIB && number_of(arena, "pages") >= 10 * MIB);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
    CHECK(number("stats.arenas") == arenas - 1);
}

static void blocks_lie_on_extents(void)
{
    if (!attached())
        return;
    dcm_arena arena = plain(), dram;
    struct dcm_arena_params params = {.struct_size = sizeof params, .placement = "dram"};
    CHECK(dcm_arena_create(&params, &dram) == DCM_OK);
    uint64_t before = number("stats.usage.extent_live");
    CHECK(dcm_malloc(dram, 10 * MIB) != NULL);
    CHECK(number("stats.usage.extent_live") < before + 10 * MIB);
    CHECK(dcm_malloc(arena, 10 * MIB) != NULL);
    CHECK(number("stats.usage.extent_live") >= before + 10 * MIB);
    CHECK(dcm_arena_destroy(arena) == DCM_OK && dcm_arena_destroy(dram) == DCM_OK);
}

static void tagged_arenas_lie_on_their_tag(void)
{
    dcm_arena arena;
    struct dcm_arena_params params = {.struct_size = sizeof params, .tag = "seven"};
    CHECK(dcm_arena_create(&params, &arena) == DCM_INVALID);
    CHECK(strstr(dcm_last_error(), "UUID"));
    if (!attached())
        return;
    dcm_arena unknown, untagged = plain();
    params.on_exhausted = "fail";
    params.tag = TAG;
    CHECK(dcm_arena_create(&params, &arena) == DCM_OK);
    params.tag = UNKNOWN_TAG;
    CHECK(dcm_arena_create(&params, &unknown) == DCM_OK);
    uint64_t before = number("stats.usage.extent_live");
    CHECK(dcm_malloc(arena, 5 * MIB) != NULL);
    CHECK(number("stats.usage.extent_live") >= before + 5 * MIB);
    CHECK(!dcm_malloc(arena, 5 * MIB) && !dcm_malloc(unknown, MIB));
    CHECK(dcm_malloc(untagged, 10 * MIB) != NULL);
    CHECK(dcm_arena_destroy(arena) == DCM_OK && dcm_arena_destroy(unknown) == DCM_OK);
    CHECK(dcm_arena_destroy(untagged) == DCM_OK);
}

static void shared_extents_are_read(void)
{
    const void *data = NULL, *second = NULL;
    size_t size = 0;
    CHECK(dcm_open_shared("seven", &data, &size) == DCM_INVALID);
    CHECK(dcm_open_shared(NULL, &data, &size) == DCM_INVALID);
    CHECK(dcm_open_shared(SHARED_TAG, NULL, &size) == DCM_INVALID);
    CHECK(dcm_close_shared(NULL) == DCM_OK && dcm_close_shared(&size) == DCM_NO_TAG);
    if (!attached())
        return;
    CHECK(dcm_open_shared(SHARED_TAG, &data, &size) == DCM_OK && size == 4 * MIB);
    CHECK(dcm_open_shared(SHARED_TAG, &second, &size) == DCM_OK && second != data);
    for (unsigned char i = 0; i < 4; i++)
        CHECK(holds((const unsigned char *)data + i * MIB, MIB, i + 1));
    CHECK(size == 4 * MIB && !memcmp(data, second, size));
    CHECK(dcm_shared_is_lost(data) == 0);
    CHECK(dcm_close_shared(data) == DCM_OK && dcm_close_shared(data) == DCM_NO_TAG);
    CHECK(holds(second, MIB, 1) && dcm_close_shared(second) == DCM_OK);
    CHECK(dcm_open_shared(UNKNOWN_TAG, &data, &size) == DCM_NO_TAG);
    CHECK(dcm_open_shared(TAG, &data, &size) == DCM_NO_TAG);
    CHECK(strstr(dcm_last_error(), "not shared"));
}

static void pins_hold_and_end(void)
{
    dcm_arena arena = plain();
    dcm_pin_id pin;
    int here;
    char *block = dcm_malloc(arena, 3 * MIB);
    CHECK(dcm_pin(block, 3 * MIB, &pin) == DCM_OK);
    CHECK(number("stats.pinned") >= 3 * MIB);
    CHECK(dcm_unpin(pin) == DCM_OK);
    CHECK(number("stats.pinned") == 0);
    CHECK(dcm_pin(&here, sizeof here, &pin) == DCM_FOREIGN);
    CHECK(dcm_pin(block, 0, &pin) == DCM_INVALID);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

enum { CACHED = 160 };
static void *cache[CACHED];
static uint64_t heard;

static int drop_cache(void *context, const struct dcm_pressure *pressure)
{
    dcm_arena *arena = context;
    void *scratch = malloc(100000);
    __atomic_store_n(&heard, pressure->bytes, __ATOMIC_RELEASE);
    for (size_t i = 0; i < CACHED; i++)
        if (dcm_arena_of(cache[i]) != *arena || dcm_free(cache[i]) != DCM_OK)
            return 1;
    free(scratch);
    return 0;
}

static int fail(void *context, const struct dcm_pressure *pressure)
{
    return context || pressure->bytes ? -1 : 0;
}

static void pressure_is_heard(void)
{
    if (!attached())
        return;
    dcm_arena fails, arena;
    struct dcm_arena_params params = {
        .struct_size = sizeof params, .name = "fails", .priority = -1, .on_pressure = fail};
    CHECK(dcm_arena_create(&params, &fails) == DCM_OK);
    params = (struct dcm_arena_params){.struct_size = sizeof params,
                                       .name = "cache",
                                       .on_pressure = drop_cache,
                                       .context = &arena};
    CHECK(dcm_arena_create(&params, &arena) == DCM_OK);
    for (size_t i = 0; i < CACHED; i++)
        CHECK((cache[i] = dcm_malloc(arena, MIB)) != NULL);
    uint64_t failures = number("stats.callback_panics");
    CHECK(dcm_release(200 * MIB, 20000) == DCM_OK);
    CHECK(__atomic_load_n(&heard, __ATOMIC_ACQUIRE) > 0);
    CHECK(number("stats.callback_panics") == failures + 1);
    CHECK(dcm_arena_destroy(arena) == DCM_OK && dcm_arena_destroy(fails) == DCM_OK);
}

static void receipt_says_what_came_back(void)
{
    if (!attached())
        return;
    char receipt[4096];
    CHECK(dcm_release(8 * MIB, 20000) == DCM_OK);
    size_t size = dcm_receipt_json(receipt, sizeof receipt);
    CHECK(size < sizeof receipt && strlen(receipt) == size);
    CHECK(strstr(receipt, "\"asked\":8388608") && strstr(receipt, "\"returned\":8388608"));
    CHECK(dcm_receipt_json(NULL, 0) == size);
}

static void live_memory_keeps_its_content(void)
{
    if (!attached())
        return;
    dcm_arena arena = plain();
    unsigned char *block = dcm_malloc(arena, 16 * MIB);
    CHECK(block);
    for (size_t i = 0; i < 16 * MIB; i += 512)
        block[i] = (unsigned char)(i / 512 * 7);
    CHECK(dcm_release(256 * MIB, 20000) == DCM_OK);
    for (size_t i = 0; i < 16 * MIB; i += 512)
        CHECK(block[i] == (unsigned char)(i / 512 * 7));
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

#define BEHAVIOUR(name) {#name, name}

int main(void)
{
    static const struct behaviour behaviours[] = {
        BEHAVIOUR(arena_is_made_and_ended),
        BEHAVIOUR(blocks_hold_what_is_written),
        BEHAVIOUR(blocks_are_aligned_and_zeroed),
        BEHAVIOUR(resizing_keeps_content),
        BEHAVIOUR(other_threads_free),
        BEHAVIOUR(limit_refuses_and_has_room_again),
        BEHAVIOUR(too_large_is_refused),
        BEHAVIOUR(foreign_memory_is_told_apart),
        BEHAVIOUR(ended_arena_is_told_apart),
        BEHAVIOUR(arenas_that_cannot_be_are_refused),
        BEHAVIOUR(settings_that_are_none_are_named),
        BEHAVIOUR(statistics_count),
        BEHAVIOUR(blocks_lie_on_extents),
        BEHAVIOUR(tagged_arenas_lie_on_their_tag),
        BEHAVIOUR(shared_extents_are_read),
        BEHAVIOUR(pins_hold_and_end),
        BEHAVIOUR(pressure_is_heard),
        BEHAVIOUR(receipt_says_what_came_back),
        BEHAVIOUR(live_memory_keeps_its_content),
    };
    return run_all(behaviours, sizeof behaviours / sizeof *behaviours);
}
