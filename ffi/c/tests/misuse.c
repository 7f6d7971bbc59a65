/* What must be refused, and then lose nothing: null pointers, wrong sizes, ended arenas, callbacks that
 * fail, block and end their arena, settings too late, another copy of the library. */
#include <dcmalloc.h>
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "suite.h"

#define MIB ((size_t)1 << 20)

static void null_pointers(void)
{
    dcm_arena arena;
    CHECK(dcm_arena_create(NULL, NULL) == DCM_INVALID && strstr(dcm_last_error(), "null"));
    CHECK(dcm_arena_create(NULL, &arena) == DCM_OK);
    CHECK(dcm_configure(NULL) == DCM_INVALID);
    CHECK(dcm_ctl(NULL, NULL, NULL, NULL, 0) == DCM_INVALID);
    size_t size = 8;
    CHECK(dcm_ctl("arenas.count", NULL, &size, NULL, 0) == DCM_INVALID);
    CHECK(dcm_ctl("config.decay", NULL, NULL, NULL, 5) == DCM_INVALID);
    dcm_pin_id pin;
    CHECK(dcm_pin(NULL, 10, &pin) == DCM_FOREIGN && dcm_pin(&pin, 10, NULL) == DCM_INVALID);
    CHECK(dcm_free(NULL) == DCM_OK && dcm_usable_size(NULL) == 0);
    CHECK(dcm_stats_json(NULL, 0) > 100);
    CHECK(!dcm_malloc(DCM_NO_ARENA_ID, 10) && errno == EINVAL);
    CHECK(dcm_arena_destroy(DCM_NO_ARENA_ID) == DCM_NO_ARENA);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

static void wrong_sizes(void)
{
    dcm_arena arena;
    struct dcm_arena_params params = {.struct_size = 7};
    CHECK(dcm_arena_create(&params, &arena) == DCM_INVALID);
    CHECK(strstr(dcm_last_error(), "sizeof(struct dcm_arena_params)"));
    struct {
        struct dcm_arena_params params;
        uint64_t more;
    } newer = {{.struct_size = sizeof newer}, 1};
    CHECK(dcm_arena_create(&newer.params, &arena) == DCM_INVALID);
    newer.more = 0;
    CHECK(dcm_arena_create(&newer.params, &arena) == DCM_OK);
    volatile size_t half = SIZE_MAX / 2 + 1;
    CHECK(!dcm_calloc(arena, half, 2) && errno == EINVAL);
    CHECK(!dcm_aligned_alloc(arena, 48, 100) && errno == EINVAL);
    CHECK(!dcm_aligned_alloc(arena, 0, 100) && errno == EINVAL);
    char *block = dcm_malloc(arena, 100);
    CHECK(dcm_free(block + 1) == DCM_FOREIGN && !dcm_realloc(arena, block + 1, 10));
    CHECK(dcm_free(block) == DCM_OK);
    uint32_t narrow;
    size_t size = sizeof narrow;
    CHECK(dcm_ctl("arenas.count", &narrow, &size, NULL, 0) == DCM_SIZE && size == 8);
    char text[4];
    size = sizeof text;
    CHECK(dcm_ctl("config", text, &size, NULL, 0) == DCM_SIZE && size > sizeof text);
    char json[16];
    CHECK(dcm_stats_json(json, sizeof json) > sizeof json && strlen(json) == sizeof json - 1);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

static void names_that_are_none(void)
{
    uint64_t value;
    size_t size = sizeof value;
    CHECK(dcm_ctl("stats.alocated", &value, &size, NULL, 0) == DCM_UNKNOWN);
    CHECK(strstr(dcm_last_error(), "did you mean `stats.allocated`?"));
    CHECK(dcm_ctl("arena.77.pages", &value, &size, NULL, 0) == DCM_NO_ARENA);
    CHECK(dcm_ctl("arena.x.pages", &value, &size, NULL, 0) == DCM_INVALID);
    CHECK(dcm_ctl("version", NULL, NULL, "2", 1) == DCM_READ_ONLY);
    CHECK(dcm_ctl("", NULL, NULL, NULL, 0) == DCM_UNKNOWN);
    CHECK(!strcmp(dcm_strerror(DCM_OK), "done") && dcm_strerror(-1) && dcm_strerror(99));
    CHECK(dcm_unpin(77) == DCM_NO_PIN);
    char path[300];
    memset(path, 'x', sizeof path - 1);
    path[sizeof path - 1] = 0;
    CHECK(dcm_attach(path) == DCM_BROKER && dcm_attach("/nowhere") == DCM_BROKER);
}

/* What does something has no value to be read or written, and is not done for the attempt. */
static void actions_have_no_value(void)
{
    dcm_arena arena;
    CHECK(dcm_arena_create(NULL, &arena) == DCM_OK);
    char purge[64], lost[64];
    snprintf(purge, sizeof purge, "arena.%llu.purge", (unsigned long long)arena);
    snprintf(lost, sizeof lost, "arena.%llu.lost", (unsigned long long)arena);
    const char *actions[] = {"heap.trim", purge};
    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        uint64_t value = 77;
        size_t size = sizeof value;
        CHECK(dcm_ctl(actions[i], &value, &size, NULL, 0) == DCM_INVALID && value == 77);
        CHECK(strstr(dcm_last_error(), "pass a null oldp"));
        CHECK(dcm_ctl(actions[i], NULL, NULL, "1", 1) == DCM_READ_ONLY);
        CHECK(dcm_ctl(actions[i], NULL, NULL, NULL, 0) == DCM_OK);
    }
    CHECK(dcm_ctl("heap.trimm", NULL, NULL, "1", 1) == DCM_UNKNOWN);
    CHECK(strstr(dcm_last_error(), "did you mean `heap.trim`?"));
    uint64_t value = 77;
    size_t size = sizeof value;
    CHECK(dcm_ctl(lost, &value, &size, NULL, 0) == DCM_OK && value == 0);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
    CHECK(dcm_ctl(purge, NULL, NULL, NULL, 0) == DCM_NO_ARENA);
}

static void settings_too_late(void)
{
    char value[16];
    size_t size = sizeof value;
    CHECK(dcm_ctl("config.decay", value, &size, NULL, 0) == DCM_OK && !strcmp(value, "77"));
    CHECK(dcm_configure("decay:5") == DCM_READ_ONLY);
    CHECK(strstr(dcm_last_error(), "started"));
    CHECK(dcm_ctl("config.decay", NULL, NULL, "5", 1) == DCM_READ_ONLY);
    size = sizeof value;
    CHECK(dcm_ctl("config.decay", value, &size, NULL, 0) == DCM_OK && !strcmp(value, "77"));
}

static int entered, ended;

static int blocks(void *context, const struct dcm_pressure *pressure)
{
    __atomic_store_n(&entered, 1, __ATOMIC_RELEASE);
    usleep(300000);
    __atomic_store_n(&ended, 1, __ATOMIC_RELEASE);
    return context || !pressure->bytes;
}

static int ends_itself(void *context, const struct dcm_pressure *pressure)
{
    dcm_arena *arena = context;
    return !pressure->bytes || dcm_arena_destroy(*arena) != DCM_OK;
}

static void *release_all(void *unused)
{
    (void)unused;
    return dcm_release(256 * MIB, 20000) == DCM_OK ? NULL : &entered;
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

/* Ending an arena waits for its callback that runs; one may end its own arena. */
static void callbacks_that_block(void)
{
    if (!attached())
        return;
    dcm_arena waits, itself;
    struct dcm_arena_params params = {.struct_size = sizeof params, .on_pressure = blocks};
    CHECK(dcm_arena_create(&params, &waits) == DCM_OK);
    params.on_pressure = ends_itself;
    params.context = &itself;
    params.priority = -1;
    CHECK(dcm_arena_create(&params, &itself) == DCM_OK);
    CHECK(dcm_malloc(waits, 64 * MIB) && dcm_malloc(itself, 8 * MIB));
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, release_all, NULL) == 0);
    for (int i = 0; i < 4000 && !__atomic_load_n(&entered, __ATOMIC_ACQUIRE); i++)
        usleep(5000);
    CHECK(__atomic_load_n(&entered, __ATOMIC_ACQUIRE));
    CHECK(dcm_arena_destroy(waits) == DCM_OK);
    CHECK(__atomic_load_n(&ended, __ATOMIC_ACQUIRE));
    void *failed = &thread;
    CHECK(pthread_join(thread, &failed) == 0 && !failed);
    CHECK(dcm_arena_destroy(itself) == DCM_NO_ARENA);
}

/* The one that is loaded by name starts no second heap, and says so. */
static void second_copy(void)
{
    const char *path = getenv("SECOND_COPY");
    if (!path) {
        skipped_because = "no second copy";
        return;
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    CHECK(library);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return;
    }
    dcm_status (*create)(const struct dcm_arena_params *, dcm_arena *);
    const char *(*last_error)(void);
    *(void **)&create = dlsym(library, "dcm_arena_create");
    *(void **)&last_error = dlsym(library, "dcm_last_error");
    CHECK(create != dcm_arena_create);
    dcm_arena arena;
    CHECK(create(NULL, &arena) == DCM_SECOND_COPY);
    CHECK(strstr(last_error(), "another copy"));
    CHECK(dcm_arena_create(NULL, &arena) == DCM_OK);
    CHECK(dcm_arena_destroy(arena) == DCM_OK);
}

#define BEHAVIOUR(name) {#name, name}

int main(void)
{
    static const struct behaviour behaviours[] = {
        BEHAVIOUR(null_pointers),      BEHAVIOUR(wrong_sizes),
        BEHAVIOUR(names_that_are_none), BEHAVIOUR(actions_have_no_value),
        BEHAVIOUR(settings_too_late),  BEHAVIOUR(callbacks_that_block),
        BEHAVIOUR(second_copy),
    };
    if (dcm_configure("decay:66") != DCM_OK || dcm_ctl("config.decay", NULL, NULL, "77", 2) != DCM_OK)
        return 2;
    return run_all(behaviours, sizeof behaviours / sizeof *behaviours);
}
