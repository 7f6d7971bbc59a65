/* What the suites in C and C++ share: a line for each check, and the status 1 if one failed. */
#ifndef SUITE_H
#define SUITE_H

#include <stdio.h>

/* What the broker of the test has: 8 MiB with the one tag, and 4 MiB that are shared under the
 * other, of which every byte is the number of its MiB, from 1. */
#define TAG "7f3e2a90-0000-4000-8000-000000000001"
#define SHARED_TAG "7f3e2a90-0000-4000-8000-000000000002"
#define UNKNOWN_TAG "7f3e2a90-0000-4000-8000-000000000003"

static int failed_line;
static const char *failed_what;
static const char *skipped_because;

#define CHECK(what)                     \
    do {                                \
        if (!(what) && !failed_line) {  \
            failed_line = __LINE__;     \
            failed_what = #what;        \
        }                               \
    } while (0)

struct behaviour {
    const char *name;
    void (*run)(void);
};

static int run_all(const struct behaviour *behaviours, size_t count)
{
    int failures = 0;
    for (size_t i = 0; i < count; i++) {
        failed_line = 0;
        skipped_because = NULL;
        behaviours[i].run();
        if (failed_line) {
            printf("FAILED %s: line %d: %s\n", behaviours[i].name, failed_line, failed_what);
            failures++;
        } else if (skipped_because) {
            printf("SKIPPED %s: %s\n", behaviours[i].name, skipped_because);
        } else {
            printf("ok %s\n", behaviours[i].name);
        }
        fflush(stdout);
    }
    return failures > 0;
}

#endif
