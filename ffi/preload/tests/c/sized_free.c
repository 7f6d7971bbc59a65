/* C23's free_sized and free_aligned_sized, and the obsolete cfree: found by name, as a program built
 * against a newer C library finds them, and freeing into the same heap as free does. */
#include "check.h"
#include <dlfcn.h>
#include <malloc.h>

typedef void (*free_sized_fn)(void *, size_t);
typedef void (*free_aligned_sized_fn)(void *, size_t, size_t);
typedef void (*cfree_fn)(void *);

static void *lookup(const char *name) {
    void *symbol = dlsym(RTLD_DEFAULT, name);
    CHECK(symbol != NULL || on_glibc, "%s is not exported", name);
    return symbol;
}

/* Frees of these sizes must neither leak nor damage what stays. */
static const size_t SIZES[] = {1, 16, 24, 100, 1000, 5000, 20 * KIB, 70 * KIB, 400 * KIB, 3 * MIB};

static void judge_sized(free_sized_fn free_sized) {
    for (size_t i = 0; i < sizeof SIZES / sizeof SIZES[0]; i++) {
        size_t size = SIZES[i];
        for (int round = 0; round < 300; round++) {
            void *a = malloc(size), *b = calloc(1, size), *c = realloc(NULL, size);
            REQUIRE(a != NULL && b != NULL && c != NULL, "allocating %zu bytes failed", size);
            *(char *)a = *(char *)c = 1;
            CHECK(zero_verify(b, size < 64 ? size : 64) == (size < 64 ? size : 64), "calloc(1, %zu) is not zero", size);
            errno = 4242;
            free_sized(a, size);
            free_sized(b, size);
            free_sized(c, size);
            CHECK(errno == 4242, "free_sized changed errno to %d", errno);
        }
    }
    free_sized(NULL, 100);
}

static void judge_aligned(free_aligned_sized_fn free_aligned_sized) {
    for (size_t i = 0; i < sizeof SIZES / sizeof SIZES[0]; i++) {
        for (size_t alignment = 16; alignment <= 64 * KIB; alignment *= 4) {
            for (int round = 0; round < 20; round++) {
                void *block = aligned_alloc(alignment, SIZES[i]);
                REQUIRE(block != NULL, "aligned_alloc(%zu, %zu) returned NULL", alignment, SIZES[i]);
                *(char *)block = 1;
                errno = 4242;
                free_aligned_sized(block, alignment, SIZES[i]);
                CHECK(errno == 4242, "free_aligned_sized changed errno to %d", errno);
            }
        }
    }
    free_aligned_sized(NULL, 64, 100);
}

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    long before = status_kib("VmRSS:");
    free_sized_fn free_sized = (free_sized_fn)lookup("free_sized");
    free_aligned_sized_fn free_aligned_sized = (free_aligned_sized_fn)lookup("free_aligned_sized");
    cfree_fn cfree = (cfree_fn)lookup("cfree");
    if (free_sized != NULL) {
        judge_sized(free_sized);
    }
    if (free_aligned_sized != NULL) {
        judge_aligned(free_aligned_sized);
    }
    if (cfree != NULL) {
        for (int i = 0; i < 50000; i++) {
            void *block = malloc(2000);
            REQUIRE(block != NULL, "malloc(2000) returned NULL");
            memset(block, 1, 2000);
            cfree(block);
        }
        cfree(NULL);
    }
    long grown = status_kib("VmRSS:") - before;
    CHECK(grown < 64 * 1024, "the process grew by %ld KiB: sized frees leak", grown);
    return check_result();
}
