/* Fills 512 MiB with objects of 1 KiB, frees 90 % of them and then does nothing, so that somebody may
 * watch how much of the memory comes back without the program's help. Says what it does as it goes:
 * `phase NAME seconds-since-start`.
 *
 *   prefix   frees all but the last tenth
 *   random   frees a random nine tenths
 *
 * usage: free_patterns prefix|random [SECONDS TO SLEEP] [MiB] */
#include "program.h"
#include <unistd.h>

enum { OBJECT = 1024 };

static double start;

static void phase(const char *name) {
    printf("phase %s %.3f\n", name, seconds_now() - start);
    fflush(stdout);
}

/* Differs from object to object, so that one found in another's place is noticed. */
static unsigned char mark(size_t i) {
    return (unsigned char)(i * 167 + (i >> 8));
}

int main(int argc, char **argv) {
    int random_pattern = argc > 1 && strcmp(argv[1], "random") == 0;
    if (!random_pattern && (argc < 2 || strcmp(argv[1], "prefix") != 0)) {
        fail("usage: free_patterns prefix|random [SECONDS TO SLEEP] [MiB]");
    }
    unsigned seconds = argc > 2 ? (unsigned)atoi(argv[2]) : 5;
    size_t count = (argc > 3 ? (size_t)atoi(argv[3]) : 512) * MIB / OBJECT;
    start = seconds_now();
    unsigned char **objects = malloc(count * sizeof *objects);
    if (objects == NULL) {
        fail("out of memory");
    }
    for (size_t i = 0; i < count; i++) {
        objects[i] = malloc(OBJECT);
        if (objects[i] == NULL) {
            fail("out of memory");
        }
        memset(objects[i], mark(i), OBJECT);
    }
    phase("filled");
    uint64_t random = 7;
    size_t freed = 0;
    for (size_t i = 0; i < count; i++) {
        if (random_pattern ? next_random(&random) % 10 != 0 : i < count - count / 10) {
            free(objects[i]);
            objects[i] = NULL;
            freed++;
        }
    }
    phase("freed");
    sleep(seconds);
    for (size_t i = 0; i < count; i++) {
        if (objects[i] != NULL && (objects[i][0] != mark(i) || objects[i][OBJECT - 1] != mark(i))) {
            fail("an object changed while the program slept");
        }
    }
    phase("verified");
    result("objects_freed", (double)freed);
    for (size_t i = 0; i < count; i++) {
        free(objects[i]);
    }
    free(objects);
    return 0;
}
