/* calloc returns zeroes, above all in memory that was dirty before. */
#include "check.h"
#include <malloc.h>

static void dirty(size_t size, int count) {
    void *blocks[256];
    for (int i = 0; i < count; i++) {
        blocks[i] = malloc(size);
        REQUIRE(blocks[i] != NULL, "malloc(%zu) returned NULL", size);
        memset(blocks[i], 0xff, size);
    }
    for (int i = 0; i < count; i++) {
        free(blocks[i]);
    }
}

static void judge(size_t size, int count) {
    void *blocks[256];
    dirty(size, count);
    for (int i = 0; i < count; i++) {
        blocks[i] = calloc(1, size);
        REQUIRE(blocks[i] != NULL, "calloc(1, %zu) returned NULL", size);
        size_t usable = malloc_usable_size(blocks[i]);
        CHECK(zero_verify(blocks[i], size) == size, "calloc(1, %zu): byte %zu is not zero", size,
              zero_verify(blocks[i], size));
        CHECK(usable >= size, "calloc(1, %zu): usable size is %zu", size, usable);
        memset(blocks[i], 0xff, size);
    }
    for (int i = 0; i < count; i++) {
        free(blocks[i]);
    }
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    for (size_t size = 1; size <= 600; size++) {
        judge(size, 64);
    }
    for (size_t size = 600; size <= 40 * KIB; size += size / 5) {
        judge(size, 128);
    }
    for (size_t size = 40 * KIB; size <= 24 * MIB; size += size / 3) {
        judge(size, size < MIB ? 16 : 3);
    }
    /* Neither factor alone is the size. */
    unsigned char *table = calloc(300, 7);
    REQUIRE(table != NULL, "calloc(300, 7) returned NULL");
    CHECK(zero_verify(table, 2100) == 2100, "calloc(300, 7) is not zero all over");
    CHECK(malloc_usable_size(table) >= 2100, "calloc(300, 7) holds %zu bytes", malloc_usable_size(table));
    free(table);
    void *none = calloc(0, 8);
    void *nothing = calloc(8, 0);
    CHECK(none != NULL && nothing != NULL && none != nothing, "calloc of nothing is not a block of its own");
    free(none);
    free(nothing);
    return check_result();
}
