/* Every block is aligned for any object that fits in it, whichever function and size class gave it. */
#include "check.h"
#include <malloc.h>

/* C asks for max_align_t for what can hold one; smaller blocks need only what fits in them. */
static size_t least_alignment(size_t size) {
    return size >= 16 ? 16 : size >= 8 ? 8 : 1;
}

static void judge(const char *function, void *block, size_t size, size_t alignment) {
    CHECK(block != NULL, "%s of %zu bytes returned NULL", function, size);
    CHECK(is_aligned(block, alignment), "%s of %zu bytes returned %p, not aligned to %zu", function, size,
          block, alignment);
    if (block != NULL) {
        memset(block, 0xa5, size);
    }
}

static void plain_functions(size_t size) {
    size_t alignment = least_alignment(size);
    void *a = malloc(size);
    judge("malloc", a, size, alignment);
    void *b = calloc(1, size);
    judge("calloc", b, size, alignment);
    void *c = realloc(NULL, size);
    judge("realloc", c, size, alignment);
    free(a);
    free(b);
    free(c);
    if (size > 0) { /* realloc(p, 0) is free */
        void *grown = realloc(malloc(1), size);
        judge("realloc of a small block", grown, size, alignment);
        free(grown);
    }
}

static void aligned_functions(size_t alignment, size_t size) {
    void *a = memalign(alignment, size);
    judge("memalign", a, size, alignment);
    void *b = aligned_alloc(alignment, size);
    judge("aligned_alloc", b, size, alignment);
    void *c = NULL;
    if (alignment >= sizeof(void *)) {
        CHECK(posix_memalign(&c, alignment, size) == 0, "posix_memalign(%zu, %zu) failed", alignment, size);
        judge("posix_memalign", c, size, alignment);
    }
    free(a);
    free(b);
    free(c);
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    for (size_t size = 0; size <= 4096; size++) {
        plain_functions(size);
    }
    /* Both sides of every size class above that: classes lie at fractions of powers of two. */
    for (size_t power = 4096; power <= 16 * MIB; power *= 2) {
        for (size_t eighth = 0; eighth < 8; eighth++) {
            size_t size = power + power / 8 * eighth;
            plain_functions(size - 1);
            plain_functions(size);
            plain_functions(size + 1);
        }
    }
    for (size_t alignment = 1; alignment <= 4 * MIB; alignment *= 2) {
        for (size_t size = 1; size <= 256 * KIB; size = size * 3 + 1) {
            aligned_functions(alignment, size);
        }
    }
    /* Several blocks alive at once: an aligned block must not overlap its neighbours. */
    enum { COUNT = 64 };
    unsigned char *blocks[COUNT];
    for (size_t i = 0; i < COUNT; i++) {
        size_t alignment = (size_t)16 << (i % 9);
        blocks[i] = memalign(alignment, 100 + i);
        REQUIRE(blocks[i] != NULL, "memalign(%zu, %zu) returned NULL", alignment, 100 + i);
        pattern_fill(blocks[i], i, 0, 100 + i);
    }
    for (size_t i = 0; i < COUNT; i++) {
        CHECK(pattern_verify(blocks[i], i, 0, 100 + i) == 100 + i, "aligned block %zu was overwritten", i);
        free(blocks[i]);
    }
    return check_result();
}
