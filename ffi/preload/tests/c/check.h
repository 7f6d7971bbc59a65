/* What the conformance programs share.
 *
 * Each program judges one concern of a malloc replacement as a plain program would meet it. A failed
 * CHECK says where and what, and the program goes on, so that one run shows every departure.
 * Exit status: 0 all held, 1 something did not, 77 could not be judged here (the reason is printed).
 *
 * By hand:  cc -O2 -fno-builtin -pthread alignment.c -o alignment && LD_PRELOAD=... ./alignment
 * All of them, in every placement: cargo xtask test conformance
 *
 * `--on-glibc` accepts the few places where glibc 2.36 itself departs from what we ask of ourselves
 * (absent C23 names, errno after posix_memalign); it exists to validate the programs, not the library.
 */
#ifndef DCMALLOC_CHECK_H
#define DCMALLOC_CHECK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define KIB ((size_t)1024)
#define MIB (1024 * KIB)

static atomic_int check_failures;
static bool on_glibc;

/* dprintf formats on the stack: a report must not depend on the allocator that it reports on. */
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition) && atomic_fetch_add(&check_failures, 1) < 20) {                           \
            dprintf(STDERR_FILENO, "%s:%d: ", __FILE__, __LINE__);                                 \
            dprintf(STDERR_FILENO, __VA_ARGS__);                                                   \
            dprintf(STDERR_FILENO, "\n");                                                          \
        }                                                                                          \
    } while (0)

/* For what the rest of the program stands on. */
#define REQUIRE(condition, ...)                                                                    \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            dprintf(STDERR_FILENO, "%s:%d: ", __FILE__, __LINE__);                                 \
            dprintf(STDERR_FILENO, __VA_ARGS__);                                                   \
            dprintf(STDERR_FILENO, " (errno %d)\n", errno);                                        \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

/* Reads the flags and sets a deadline: a deadlock ends as SIGALRM, not as a hanging test run. */
__attribute__((unused)) static void check_start(int argc, char **argv, unsigned deadline_seconds) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--on-glibc") == 0) {
            on_glibc = true;
        }
    }
    alarm(deadline_seconds);
}

__attribute__((unused)) static int check_result(void) {
    int failures = atomic_load(&check_failures);
    if (failures > 20) {
        dprintf(STDERR_FILENO, "... and %d more\n", failures - 20);
    }
    return failures == 0 ? 0 : 1;
}

__attribute__((unused)) static int check_skip(const char *reason) {
    dprintf(STDERR_FILENO, "SKIPPED: %s\n", reason);
    return 77;
}

/* A pattern that tells blocks, and places in a block, apart. */
static inline unsigned char pattern_at(size_t seed, size_t i) {
    return (unsigned char)((seed * 131 + i * 7 + (i >> 8) * 13 + (i >> 16) * 29) ^ 0x5a);
}

__attribute__((unused)) static void pattern_fill(void *block, size_t seed, size_t from, size_t to) {
    unsigned char *bytes = block;
    for (size_t i = from; i < to; i++) {
        bytes[i] = pattern_at(seed, i);
    }
}

/* The first place that differs, or `to`. */
__attribute__((unused)) static size_t pattern_verify(const void *block, size_t seed, size_t from, size_t to) {
    const unsigned char *bytes = block;
    for (size_t i = from; i < to; i++) {
        if (bytes[i] != pattern_at(seed, i)) {
            return i;
        }
    }
    return to;
}

/* The first byte that is not zero, or `len`. */
__attribute__((unused)) static size_t zero_verify(const void *block, size_t len) {
    const unsigned char *bytes = block;
    for (size_t i = 0; i < len; i++) {
        if (bytes[i] != 0) {
            return i;
        }
    }
    return len;
}

__attribute__((unused)) static bool is_aligned(const void *block, size_t alignment) {
    return ((uintptr_t)block & (alignment - 1)) == 0;
}

/* Small and good enough; a seed per thread keeps runs repeatable. */
static inline uint64_t next_random(uint64_t *state) {
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

__attribute__((unused)) static double seconds_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* A figure of /proc/self/status in KiB ("VmRSS:", "VmSize:"), read without stdio. */
__attribute__((unused)) static long status_kib(const char *field) {
    extern int open(const char *, int, ...);
    char text[4096];
    int fd = open("/proc/self/status", 0);
    if (fd < 0) {
        return -1;
    }
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    if (n <= 0) {
        return -1;
    }
    text[n] = 0;
    const char *at = strstr(text, field);
    return at == NULL ? -1 : strtol(at + strlen(field), NULL, 10);
}

#endif
