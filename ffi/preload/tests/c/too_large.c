/* A request that cannot be met returns NULL and sets errno to ENOMEM, from every entry point, also
 * where adding headers or rounding up would wrap around. */
#include "check.h"
#include <malloc.h>

/* Volatile, so that the compiler does not reject or fold what it knows to be too large. */
static volatile size_t one = 1;

static void expect_enomem(const char *call, size_t size, void *block) {
    int error = errno;
    CHECK(block == NULL, "%s of %#zx bytes returned %p instead of NULL", call, size, block);
    CHECK(block != NULL || error == ENOMEM, "%s of %#zx bytes left errno at %d instead of ENOMEM", call, size,
          error);
    if (block != NULL) {
        free(block);
    }
    errno = 0;
}

static void expect_posix_enomem(size_t alignment, size_t size) {
    int marker;
    void *untouched = &marker;
    void *block = untouched;
    errno = 4242;
    int result = posix_memalign(&block, alignment, size);
    CHECK(result == ENOMEM, "posix_memalign(%zu, %#zx) returned %d instead of ENOMEM", alignment, size, result);
    CHECK(block == untouched, "posix_memalign(%zu, %#zx) failed and wrote its result pointer", alignment, size);
    if (!on_glibc) {
        CHECK(errno == 4242, "posix_memalign(%zu, %#zx) changed errno to %d", alignment, size, errno);
    }
    errno = 0;
}

static void judge(size_t size) {
    errno = 0;
    expect_enomem("malloc", size, malloc(size));
    expect_enomem("calloc(1, n)", size, calloc(1, size));
    expect_enomem("calloc(n, 1)", size, calloc(size, one));
    expect_enomem("realloc(NULL, n)", size, realloc(NULL, size));
    expect_enomem("reallocarray(NULL, 1, n)", size, reallocarray(NULL, 1, size));
    expect_enomem("reallocarray(NULL, n, 1)", size, reallocarray(NULL, size, one));
    expect_enomem("valloc", size, valloc(size));
    expect_enomem("pvalloc", size, pvalloc(size));
    for (size_t alignment = 1; alignment <= 4 * MIB; alignment *= 8) {
        expect_enomem("memalign", size, memalign(alignment, size));
        expect_enomem("aligned_alloc", size, aligned_alloc(alignment, size));
        if (alignment >= sizeof(void *)) {
            expect_posix_enomem(alignment, size);
        }
    }

    /* The old block is neither freed nor moved nor changed. */
    for (size_t old = 16; old <= 4 * MIB; old *= 64) {
        unsigned char *block = malloc(old);
        REQUIRE(block != NULL, "malloc(%zu) returned NULL", old);
        pattern_fill(block, old, 0, old);
        errno = 0;
        void *moved = realloc(block, size);
        expect_enomem("realloc of a live block", size, moved);
        if (moved != NULL) {
            continue;
        }
        moved = reallocarray(block, size, one);
        expect_enomem("reallocarray of a live block", size, moved);
        if (moved != NULL) {
            continue;
        }
        CHECK(pattern_verify(block, old, 0, old) == old, "a failed realloc of %zu bytes changed the block", old);
        free(block);
    }
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    for (size_t below = 0; below <= 20 * KIB; below += below < 64 ? 1 : 509) {
        judge(SIZE_MAX - below);
        judge((size_t)PTRDIFF_MAX + 1 + below);
        judge((size_t)PTRDIFF_MAX - below);
    }
    /* Products that overflow, and products that do not but are too large all the same. */
    for (size_t shift = 0; shift < 64; shift++) {
        volatile size_t a = (size_t)1 << shift;
        volatile size_t b = shift == 0 ? SIZE_MAX : (size_t)1 << (64 - shift);
        errno = 0;
        expect_enomem("calloc whose product overflows", a, calloc(a, b));
        expect_enomem("reallocarray whose product overflows", a, reallocarray(NULL, a, b));
        expect_enomem("calloc whose product wraps to a small one", a, calloc(a + 1, b));
    }
    /* An alignment alone can be too large. */
    for (size_t alignment = (size_t)1 << 50; alignment != 0; alignment <<= 1) {
        errno = 0;
        expect_enomem("memalign of 16 bytes, huge alignment", alignment, memalign(alignment, 16));
        expect_enomem("aligned_alloc of 16 bytes, huge alignment", alignment, aligned_alloc(alignment, 16));
        expect_posix_enomem(alignment, 16);
    }
    /* What was refused left nothing behind: an ordinary request still works. */
    void *block = malloc(1000);
    CHECK(block != NULL, "malloc(1000) failed after the refusals");
    free(block);
    return check_result();
}
