/* The aligned functions and the alignments they refuse: memalign rounds a strange alignment up,
 * aligned_alloc and posix_memalign call it invalid. */
#include "check.h"
#include <malloc.h>

static size_t next_power(size_t n) {
    size_t power = 1;
    while (power < n) {
        power *= 2;
    }
    return power;
}

static void memalign_rounds_up(void) {
    for (size_t alignment = 0; alignment <= 5000; alignment += alignment < 70 ? 1 : 97) {
        void *block = memalign(alignment, 100);
        CHECK(block != NULL, "memalign(%zu, 100) returned NULL", alignment);
        CHECK(is_aligned(block, next_power(alignment)), "memalign(%zu, 100) returned %p, not aligned to %zu",
              alignment, block, next_power(alignment));
        if (block != NULL) {
            memset(block, 1, 100);
        }
        free(block);
    }
    /* No power of two is as large as this. */
    volatile size_t beyond = SIZE_MAX / 2 + 2;
    errno = 0;
    void *block = memalign(beyond, 100);
    CHECK(block == NULL && errno == EINVAL, "memalign(%#zx, 100) returned %p with errno %d instead of NULL, EINVAL",
          beyond, block, errno);
}

static void aligned_alloc_refuses(void) {
    static const size_t STRANGE[] = {3, 5, 6, 7, 9, 12, 24, 48, 96, 100, 4095, 4097, 12288};
    for (size_t i = 0; i < sizeof STRANGE / sizeof STRANGE[0]; i++) {
        errno = 0;
        void *block = aligned_alloc(STRANGE[i], STRANGE[i] * 4);
        if (on_glibc) {
            free(block); /* before 2.38, glibc rounds up here as memalign does */
            continue;
        }
        CHECK(block == NULL && errno == EINVAL,
              "aligned_alloc(%zu, ...) returned %p with errno %d instead of NULL, EINVAL", STRANGE[i], block, errno);
        free(block);
    }
    /* C17 no longer asks for the size to be a multiple. */
    void *block = aligned_alloc(4096, 100);
    CHECK(block != NULL && is_aligned(block, 4096), "aligned_alloc(4096, 100) returned %p", block);
    free(block);
}

static void posix_memalign_refuses(void) {
    static const size_t STRANGE[] = {0, 1, 2, 3, 4, 5, 7, 9, 12, 24, 40, 100, 4095, 4097};
    int marker = 0;
    for (size_t i = 0; i < sizeof STRANGE / sizeof STRANGE[0]; i++) {
        void *block = &marker;
        errno = 4242;
        int result = posix_memalign(&block, STRANGE[i], 64);
        CHECK(result == EINVAL, "posix_memalign(%zu) returned %d instead of EINVAL", STRANGE[i], result);
        CHECK(block == &marker, "posix_memalign(%zu) failed and wrote its result pointer", STRANGE[i]);
        CHECK(errno == 4242, "posix_memalign(%zu) changed errno to %d", STRANGE[i], errno);
        if (block != &marker) {
            free(block);
        }
    }
}

static void size_zero(void) {
    void *a = memalign(64, 0);
    void *b = aligned_alloc(64, 0);
    void *c = NULL;
    CHECK(posix_memalign(&c, 64, 0) == 0, "posix_memalign(64, 0) failed");
    CHECK(a != NULL && b != NULL && c != NULL, "an aligned block of 0 bytes is NULL: %p %p %p", a, b, c);
    CHECK(a != b && b != c && a != c, "aligned blocks of 0 bytes are not distinct");
    free(a);
    free(b);
    free(c);
}

static void survives_mixed_frees(void) {
    enum { COUNT = 400 };
    static unsigned char *blocks[COUNT];
    static size_t sizes[COUNT];
    uint64_t random = 2463534242u;
    for (int step = 0; step < 40000; step++) {
        size_t i = next_random(&random) % COUNT;
        if (blocks[i] != NULL) {
            CHECK(pattern_verify(blocks[i], i, 0, sizes[i]) == sizes[i], "aligned block %zu was overwritten", i);
            free(blocks[i]);
        }
        size_t alignment = (size_t)8 << next_random(&random) % 12;
        sizes[i] = next_random(&random) % 3000 + 1;
        blocks[i] = memalign(alignment, sizes[i]);
        REQUIRE(blocks[i] != NULL && is_aligned(blocks[i], alignment), "memalign(%zu, %zu) returned %p", alignment,
                sizes[i], (void *)blocks[i]);
        pattern_fill(blocks[i], i, 0, sizes[i]);
    }
    for (int i = 0; i < COUNT; i++) {
        free(blocks[i]);
    }
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    memalign_rounds_up();
    aligned_alloc_refuses();
    posix_memalign_refuses();
    size_zero();
    survives_mixed_frees();
    return check_result();
}
