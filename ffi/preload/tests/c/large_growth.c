/* Large blocks: growing by realloc step by step, content and all, in place or moved. */
#include "check.h"
#include <malloc.h>

static void grow_to(size_t limit, size_t step_numerator) {
    size_t size = 100 * KIB;
    unsigned char *block = malloc(size);
    REQUIRE(block != NULL, "malloc(%zu) returned NULL", size);
    pattern_fill(block, 1, 0, size);
    while (size < limit) {
        size_t next = size * step_numerator / 8;
        block = realloc(block, next);
        REQUIRE(block != NULL, "realloc from %zu to %zu returned NULL", size, next);
        CHECK(pattern_verify(block, 1, size - 4096, size) == size, "realloc to %zu lost its tail", next);
        pattern_fill(block, 1, size, next);
        size = next;
    }
    CHECK(pattern_verify(block, 1, 0, size) == size, "after growing to %zu, byte %zu is wrong", size,
          pattern_verify(block, 1, 0, size));
    while (size > 64 * KIB) {
        size = size / 3;
        block = realloc(block, size);
        REQUIRE(block != NULL, "realloc down to %zu returned NULL", size);
        CHECK(pattern_verify(block, 1, 0, size) == size, "after shrinking to %zu, byte %zu is wrong", size,
              pattern_verify(block, 1, 0, size));
    }
    free(block);
}

static void two_in_turn(void) {
    /* Two blocks that grow in turn are in each other's way, so that both must move. */
    unsigned char *blocks[2] = {NULL, NULL};
    size_t size = 0;
    for (int step = 0; step < 24; step++) {
        size_t next = size + 700 * KIB;
        for (size_t i = 0; i < 2; i++) {
            blocks[i] = realloc(blocks[i], next);
            REQUIRE(blocks[i] != NULL, "realloc to %zu returned NULL", next);
            pattern_fill(blocks[i], i, size, next);
        }
        size = next;
    }
    for (size_t i = 0; i < 2; i++) {
        CHECK(pattern_verify(blocks[i], i, 0, size) == size, "block %zu of two growing in turn lost content", i);
        free(blocks[i]);
    }
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    grow_to(96 * MIB, 9);
    grow_to(48 * MIB, 16);
    two_in_turn();
    unsigned char *huge = malloc(256 * MIB);
    REQUIRE(huge != NULL, "malloc(256 MiB) returned NULL");
    for (size_t at = 0; at < 256 * MIB; at += 4096) {
        huge[at] = pattern_at(2, at);
    }
    for (size_t at = 0; at < 256 * MIB; at += 4096) {
        CHECK(huge[at] == pattern_at(2, at), "a block of 256 MiB lost byte %zu", at);
    }
    free(huge);
    return check_result();
}
