/* realloc: glibc's answer to size 0, content kept through growing, shrinking and moving, NULL as malloc. */
#include "check.h"
#include <malloc.h>

static void size_zero_frees(void) {
    /* glibc: realloc(p, 0) with p != NULL is free(p) and returns NULL. Programs loop over it, and a
     * library that returned a fresh block each time would leak. */
    long before = status_kib("VmRSS:");
    for (int i = 0; i < 20000; i++) {
        void *block = malloc(8000);
        REQUIRE(block != NULL, "malloc(8000) returned NULL");
        memset(block, 7, 8000);
        void *result = realloc(block, 0);
        CHECK(result == NULL, "realloc(p, 0) returned %p instead of freeing and returning NULL", result);
        if (result != NULL) {
            return;
        }
    }
    long grown = status_kib("VmRSS:") - before;
    CHECK(grown < 64 * 1024, "20,000 times realloc(p, 0) grew the process by %ld KiB: blocks leak", grown);
}

static void null_is_malloc(void) {
    void *empty = realloc(NULL, 0);
    CHECK(empty != NULL, "realloc(NULL, 0) returned NULL; malloc(0) is a block");
    free(empty);
    void *block = realloc(NULL, 1000);
    CHECK(block != NULL, "realloc(NULL, 1000) returned NULL");
    memset(block, 1, 1000);
    free(block);
}

static void content_kept(size_t from, size_t to) {
    unsigned char *block = malloc(from);
    REQUIRE(block != NULL, "malloc(%zu) returned NULL", from);
    pattern_fill(block, from, 0, from);
    block = realloc(block, to);
    REQUIRE(block != NULL, "realloc from %zu to %zu returned NULL", from, to);
    size_t kept = from < to ? from : to;
    CHECK(pattern_verify(block, from, 0, kept) == kept, "realloc from %zu to %zu lost byte %zu", from, to,
          pattern_verify(block, from, 0, kept));
    memset(block, 0xee, to);
    free(block);
}

static void aligned_content_kept(void) {
    for (size_t alignment = 32; alignment <= 2 * MIB; alignment *= 4) {
        unsigned char *block = memalign(alignment, 5000);
        REQUIRE(block != NULL, "memalign(%zu, 5000) returned NULL", alignment);
        pattern_fill(block, alignment, 0, 5000);
        block = realloc(block, 300 * KIB);
        REQUIRE(block != NULL, "realloc of an aligned block returned NULL");
        CHECK(pattern_verify(block, alignment, 0, 5000) == 5000, "realloc of a block aligned to %zu lost bytes",
              alignment);
        free(block);
    }
}

static void random_walk(void) {
    enum { COUNT = 200 };
    static unsigned char *blocks[COUNT];
    static size_t sizes[COUNT];
    uint64_t random = 88172645463325252u;
    for (int step = 0; step < 60000; step++) {
        size_t i = next_random(&random) % COUNT;
        size_t size = next_random(&random) % 4 == 0 ? next_random(&random) % (200 * KIB) : next_random(&random) % 2000;
        size += 1;
        unsigned char *block = realloc(blocks[i], size);
        REQUIRE(block != NULL, "realloc to %zu returned NULL", size);
        size_t kept = sizes[i] < size ? sizes[i] : size;
        size_t probe = kept < 256 ? kept : 256;
        CHECK(pattern_verify(block, i, 0, probe) == probe, "block %zu lost its head at %zu bytes", i, size);
        CHECK(pattern_verify(block, i, kept - probe, kept) == kept, "block %zu lost its tail at %zu bytes", i, size);
        if (size > sizes[i]) {
            pattern_fill(block, i, sizes[i], size);
        }
        blocks[i] = block;
        sizes[i] = size;
    }
    for (int i = 0; i < COUNT; i++) {
        free(blocks[i]);
    }
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    size_zero_frees();
    null_is_malloc();
    static const size_t SIZES[] = {1, 8, 24, 100, 1000, 4096, 15 * KIB, 31 * KIB, 65 * KIB, 200 * KIB, MIB, 3 * MIB, 9 * MIB};
    for (size_t i = 0; i < sizeof SIZES / sizeof SIZES[0]; i++) {
        for (size_t j = 0; j < sizeof SIZES / sizeof SIZES[0]; j++) {
            content_kept(SIZES[i], SIZES[j]);
        }
    }
    aligned_content_kept();
    random_walk();
    return check_result();
}
