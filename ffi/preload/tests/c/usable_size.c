/* malloc_usable_size: 0 for NULL, never less than asked, and every byte of it belongs to the caller. */
#include "check.h"
#include <malloc.h>

static void judge(const char *function, void *block, size_t size) {
    REQUIRE(block != NULL, "%s of %zu bytes returned NULL", function, size);
    size_t usable = malloc_usable_size(block);
    CHECK(usable >= size, "%s of %zu bytes has a usable size of %zu", function, size, usable);
    CHECK(usable <= size * 2 + 2 * 4096, "%s of %zu bytes has an implausible usable size of %zu", function, size, usable);
    pattern_fill(block, size, 0, usable);
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    CHECK(malloc_usable_size(NULL) == 0, "malloc_usable_size(NULL) is %zu", malloc_usable_size(NULL));
    for (size_t size = 0; size <= 3 * MIB; size += size < 300 ? 1 : size / 7) {
        /* Neighbours of one class: writing one to its usable end must not show in the next. */
        void *a = malloc(size), *b = malloc(size), *c = calloc(1, size), *d = memalign(64, size);
        judge("malloc", a, size);
        judge("malloc", b, size);
        judge("calloc", c, size);
        judge("memalign", d, size);
        void *all[] = {a, b, c, d};
        for (int i = 0; i < 4; i++) {
            size_t usable = malloc_usable_size(all[i]);
            CHECK(pattern_verify(all[i], size, 0, usable) == usable, "a neighbour overwrote a block of %zu bytes", size);
        }
        /* The content up to the usable size survives a realloc to it. */
        size_t usable = malloc_usable_size(a);
        a = realloc(a, usable + 1);
        REQUIRE(a != NULL, "realloc to %zu returned NULL", usable + 1);
        CHECK(pattern_verify(a, size, 0, size) == size, "realloc past the usable size of %zu lost bytes", usable);
        free(a);
        free(b);
        free(c);
        free(d);
    }
    void *x = malloc(0), *y = malloc(0);
    CHECK(x != NULL && y != NULL && x != y, "malloc(0) twice gave %p and %p", x, y);
    free(x);
    free(y);
    return check_result();
}
