/* free never touches errno (POSIX 2024, and what glibc promises); a successful allocation leaves it too,
 * so that code between a failing call and its report may allocate. */
#include "check.h"
#include <malloc.h>

static const size_t SIZES[] = {1, 16, 100, 1024, 14 * KIB, 33 * KIB, 64 * KIB, 300 * KIB, 2 * MIB, 5 * MIB, 64 * MIB};
enum { SENTINEL = 4242, COUNT = sizeof SIZES / sizeof SIZES[0] };

static void *expect_kept(const char *call, size_t size, void *block) {
    CHECK(block != NULL, "%s of %zu bytes returned NULL", call, size);
    CHECK(errno == SENTINEL, "%s of %zu bytes changed errno to %d", call, size, errno);
    errno = SENTINEL;
    return block;
}

static void expect_free_keeps(size_t size, void *block) {
    errno = SENTINEL;
    free(block);
    CHECK(errno == SENTINEL, "free of %zu bytes changed errno to %d", size, errno);
    errno = SENTINEL;
}

static void judge(size_t size) {
    errno = SENTINEL;
    void *block = expect_kept("malloc", size, malloc(size));
    memset(block, 1, size);
    block = expect_kept("realloc to double", size, realloc(block, size * 2));
    block = expect_kept("realloc to half", size, realloc(block, size / 2 + 1));
    expect_free_keeps(size, block);
    expect_free_keeps(size, expect_kept("calloc", size, calloc(2, size)));
    expect_free_keeps(size, expect_kept("reallocarray", size, reallocarray(NULL, 2, size)));
    expect_free_keeps(size, expect_kept("memalign", size, memalign(64, size)));
    expect_free_keeps(size, expect_kept("aligned_alloc", size, aligned_alloc(4096, size)));
    expect_free_keeps(size, expect_kept("valloc", size, valloc(size)));
    expect_free_keeps(size, expect_kept("pvalloc", size, pvalloc(size)));
    void *aligned = NULL;
    CHECK(posix_memalign(&aligned, 64, size) == 0, "posix_memalign of %zu bytes failed", size);
    expect_free_keeps(size, expect_kept("posix_memalign", size, aligned));
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    errno = SENTINEL;
    free(NULL);
    CHECK(errno == SENTINEL, "free(NULL) changed errno to %d", errno);
    for (int i = 0; i < COUNT; i++) {
        judge(SIZES[i]);
    }
    /* Many at once: their frees reach the slow paths (caches flushed, memory given back). */
    enum { MANY = 2000 };
    static void *blocks[MANY];
    for (int round = 0; round < COUNT - 3; round++) {
        int count = SIZES[round] > 100 * KIB ? 40 : MANY;
        for (int i = 0; i < count; i++) {
            blocks[i] = malloc(SIZES[round]);
            REQUIRE(blocks[i] != NULL, "malloc(%zu) returned NULL", SIZES[round]);
            *(char *)blocks[i] = 1;
        }
        for (int i = 0; i < count; i++) {
            expect_free_keeps(SIZES[round], blocks[i]);
        }
    }
    return check_result();
}
