/* One malloc and its free, over and over, for sizes of 16 to 1024 bytes: the fast path and nothing else.
 * Per size the median of many short slices, which survives a busy machine; `ns_per_pair` is their mean.
 *
 * usage: pair [SLICES] */
#include "program.h"

enum { PAIRS = 20000, MAX_SLICES = 1001 };

/* Volatile, so that the compiler does not take the pair away. */
static void *(*volatile allocate)(size_t) = malloc;
static void (*volatile release)(void *) = free;

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median_ns(size_t size, int slices) {
    static double samples[MAX_SLICES];
    for (int s = 0; s < slices; s++) {
        double start = seconds_now();
        for (int i = 0; i < PAIRS; i++) {
            char *block = allocate(size);
            *(volatile char *)block = 1;
            release(block);
        }
        samples[s] = (seconds_now() - start) * 1e9 / PAIRS;
    }
    qsort(samples, (size_t)slices, sizeof samples[0], by_value);
    return samples[slices / 2];
}

int main(int argc, char **argv) {
    int slices = argc > 1 ? atoi(argv[1]) : 201;
    if (slices < 1 || slices > MAX_SLICES) {
        fail("usage: pair [SLICES of 1 to 1001]");
    }
    double sum = 0;
    int sizes = 0;
    for (size_t size = 16; size <= 1024; size *= 2, sizes++) {
        double ns = median_ns(size, slices);
        char name[32];
        snprintf(name, sizeof name, "ns_per_pair_%zu", size);
        result(name, ns);
        sum += ns;
    }
    result("ns_per_pair", sum / sizes);
    return 0;
}
