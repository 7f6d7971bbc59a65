/* Builds 100 MB up in blocks of 64 KiB to 4 MiB, every page touched, and tears it down in random order;
 * again and again. What it measures is how an allocator keeps, and how it returns, large memory.
 *
 * usage: buildup [ROUNDS] */
#include "program.h"

#define TOTAL ((size_t)100000000)
enum { MAX_BLOCKS = 2000 };

static size_t pick_size(uint64_t *random) {
    /* Evenly over the powers of two from 64 KiB to 2 MiB, then anywhere up to the next. */
    size_t base = 64 * KIB << next_random(random) % 6;
    return base + next_random(random) % base;
}

int main(int argc, char **argv) {
    int rounds = argc > 1 ? atoi(argv[1]) : 50;
    static char *blocks[MAX_BLOCKS];
    uint64_t random = 20261122;
    double start = seconds_now();
    for (int round = 0; round < rounds; round++) {
        size_t total = 0, count = 0;
        while (total < TOTAL) {
            size_t size = pick_size(&random);
            char *block = malloc(size);
            if (block == NULL || count == MAX_BLOCKS) {
                fail("out of memory");
            }
            for (size_t at = 0; at < size; at += 4096) {
                block[at] = (char)at;
            }
            blocks[count++] = block;
            total += size;
        }
        while (count > 0) {
            size_t at = next_random(&random) % count;
            free(blocks[at]);
            blocks[at] = blocks[--count];
        }
    }
    result("seconds", seconds_now() - start);
    return 0;
}
