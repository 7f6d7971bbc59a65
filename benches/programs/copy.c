/* How fast memory of the heap is copied to DRAM and back, before and after it was taken from under the
 * program: fills a block, measures, says `ready`, waits for FILE to appear, checks the block and measures
 * again. Rates are medians of seven.
 *
 * usage: copy MIB FILE */
#include "program.h"
#include <sys/mman.h>
#include <unistd.h>

enum { ROUNDS = 7 };

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(const char *name, void *to, const void *from, size_t len) {
    double rates[ROUNDS];
    for (int i = 0; i < ROUNDS; i++) {
        double start = seconds_now();
        memcpy(to, from, len);
        /* What is copied counts as read, or the compiler may leave the copy out. */
        __asm__ volatile("" ::"r"(to) : "memory");
        rates[i] = (double)len / (double)MIB / (seconds_now() - start);
    }
    qsort(rates, ROUNDS, sizeof rates[0], by_value);
    result(name, rates[ROUNDS / 2]);
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fail("usage: copy MIB FILE");
    }
    size_t len = (size_t)atoi(argv[1]) * MIB, words = len / sizeof(uint64_t);
    uint64_t *block = malloc(len);
    uint64_t *dram = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (block == NULL || dram == MAP_FAILED) {
        fail("out of memory");
    }
    uint64_t random = 88172645463325252;
    for (size_t i = 0; i < words; i++) {
        block[i] = next_random(&random);
    }
    measure("out_mib_per_second", dram, block, len);
    measure("in_mib_per_second", block, dram, len);
    printf("ready\n");
    fflush(stdout);
    while (access(argv[2], F_OK) != 0) {
        usleep(20000);
    }
    random = 88172645463325252;
    for (size_t i = 0; i < words; i++) {
        if (block[i] != next_random(&random)) {
            fail("the block was damaged");
        }
    }
    measure("moved_out_mib_per_second", dram, block, len);
    free(block);
    return 0;
}
