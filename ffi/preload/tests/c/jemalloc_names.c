/* Programs linked against jemalloc call its own names beside malloc. They must answer for this heap:
 * a block from mallocx that free does not know is two heaps in one program. */
#include "check.h"
#include <dlfcn.h>
#include <malloc.h>

#define LG_ALIGN(lg) ((int)(lg))
#define ZERO 0x40

static void *(*mallocx_)(size_t, int);
static void *(*rallocx_)(void *, size_t, int);
static size_t (*xallocx_)(void *, size_t, size_t, int);
static size_t (*sallocx_)(const void *, int);
static void (*dallocx_)(void *, int);
static void (*sdallocx_)(void *, size_t, int);
static size_t (*nallocx_)(size_t, int);
static int (*mallctl_)(const char *, void *, size_t *, void *, size_t);
static int (*mallctlnametomib_)(const char *, size_t *, size_t *);
static int (*mallctlbymib_)(const size_t *, size_t, void *, size_t *, void *, size_t);
static void (*malloc_stats_print_)(void (*)(void *, const char *), void *, const char *);

static size_t printed;
static void count_output(void *argument, const char *text) {
    (void)argument;
    printed += strlen(text);
}

static void lookup(const char *name, void *pointer) {
    void *symbol = dlsym(RTLD_DEFAULT, name);
    CHECK(symbol != NULL, "%s is not exported", name);
    memcpy(pointer, &symbol, sizeof symbol);
}

static void one_heap(void) {
    for (size_t size = 1; size < 8 * MIB; size = size * 5 + 3) {
        unsigned char *block = mallocx_(size, LG_ALIGN(6) | ZERO);
        REQUIRE(block != NULL, "mallocx(%zu) returned NULL", size);
        CHECK(is_aligned(block, 64), "mallocx(%zu) with alignment 64 returned %p", size, (void *)block);
        CHECK(zero_verify(block, size) == size, "mallocx(%zu) with zero is dirty", size);
        CHECK(sallocx_(block, 0) == malloc_usable_size(block), "sallocx and malloc_usable_size disagree on %zu bytes", size);
        CHECK(nallocx_(size, LG_ALIGN(6)) >= size, "nallocx(%zu) is %zu", size, nallocx_(size, LG_ALIGN(6)));
        pattern_fill(block, size, 0, size);
        block = rallocx_(block, size * 2, 0);
        REQUIRE(block != NULL, "rallocx(%zu) returned NULL", size * 2);
        CHECK(pattern_verify(block, size, 0, size) == size, "rallocx of %zu bytes lost content", size);
        CHECK(xallocx_(block, size, 0, 0) >= size, "xallocx shrank %zu bytes to too little", size);
        block = realloc(block, size);
        REQUIRE(block != NULL, "realloc of an rallocx block returned NULL");
        free(block);

        block = malloc(size);
        REQUIRE(block != NULL, "malloc(%zu) returned NULL", size);
        memset(block, 0xff, size);
        dallocx_(block, 0);
        block = malloc(size);
        REQUIRE(block != NULL, "malloc(%zu) returned NULL", size);
        sdallocx_(block, size, 0);
    }
}

static size_t read_allocated(void) {
    uint64_t epoch = 1;
    size_t length = sizeof epoch, allocated = 0, allocated_length = sizeof allocated;
    CHECK(mallctl_("epoch", &epoch, &length, &epoch, sizeof epoch) == 0, "mallctl(epoch) failed");
    CHECK(mallctl_("stats.allocated", &allocated, &allocated_length, NULL, 0) == 0, "mallctl(stats.allocated) failed");
    return allocated;
}

static void statistics_are_of_this_heap(void) {
    size_t before = read_allocated();
    void *block = malloc(32 * MIB);
    REQUIRE(block != NULL, "malloc(32 MiB) returned NULL");
    /* Less what other threads may have freed meanwhile. */
    CHECK(read_allocated() >= before + 31 * MIB, "stats.allocated grew by %zd for 32 MiB",
          (ssize_t)(read_allocated() - before));
    free(block);

    size_t mib[4], depth = 4, allocated, length = sizeof allocated;
    CHECK(mallctlnametomib_("stats.allocated", mib, &depth) == 0, "mallctlnametomib(stats.allocated) failed");
    CHECK(mallctlbymib_(mib, depth, &allocated, &length, NULL, 0) == 0, "mallctlbymib(stats.allocated) failed");
    CHECK(mallctl_("no.such.name", NULL, NULL, NULL, 0) != 0, "mallctl accepts a name that does not exist");
    malloc_stats_print_(count_output, NULL, NULL);
    CHECK(printed > 0, "malloc_stats_print printed nothing");
}

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    if (on_glibc) {
        return check_skip("glibc has none of jemalloc's names");
    }
    lookup("mallocx", &mallocx_);
    lookup("rallocx", &rallocx_);
    lookup("xallocx", &xallocx_);
    lookup("sallocx", &sallocx_);
    lookup("dallocx", &dallocx_);
    lookup("sdallocx", &sdallocx_);
    lookup("nallocx", &nallocx_);
    lookup("mallctl", &mallctl_);
    lookup("mallctlnametomib", &mallctlnametomib_);
    lookup("mallctlbymib", &mallctlbymib_);
    lookup("malloc_stats_print", &malloc_stats_print_);
    if (check_result() == 0) {
        one_heap();
        statistics_are_of_this_heap();
    }
    return check_result();
}
