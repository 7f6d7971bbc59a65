/* What the workload programs share: a clock, random numbers, and the form of a result line.
 *
 * The programs know nothing of any allocator; whoever compares runs them under LD_PRELOAD. A result is
 * one line `name value` on stdout, and names say the unit: seconds and ns are better small,
 * ops_per_second is better large. */
#ifndef DCMALLOC_BENCH_PROGRAM_H
#define DCMALLOC_BENCH_PROGRAM_H

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define KIB ((size_t)1024)
#define MIB (1024 * KIB)

static inline double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static inline uint64_t next_random(uint64_t *state) {
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

static inline void result(const char *name, double value) {
    printf("%s %.6g\n", name, value);
    fflush(stdout);
}

__attribute__((noreturn, unused)) static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

#endif
