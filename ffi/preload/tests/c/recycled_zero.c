/* Large zeroed blocks over memory that was dirty, given back and handed out again, also by several
 * threads: whoever promises zeroes without looking is found out here. */
#include "check.h"
#include <pthread.h>

enum { ROUNDS = 40, HELD = 6 };

static void *worker(void *argument) {
    uint64_t random = (size_t)argument * 977 + 5;
    unsigned char *held[HELD] = {0};
    for (int round = 0; round < ROUNDS; round++) {
        size_t i = next_random(&random) % HELD;
        free(held[i]);
        size_t size = 64 * KIB + next_random(&random) % (6 * MIB);
        if (round % 2 == 0) {
            held[i] = calloc(1, size);
            REQUIRE(held[i] != NULL, "calloc(1, %zu) returned NULL", size);
            CHECK(zero_verify(held[i], size) == size, "calloc(1, %zu): byte %zu is not zero", size,
                  zero_verify(held[i], size));
        } else {
            held[i] = malloc(size);
            REQUIRE(held[i] != NULL, "malloc(%zu) returned NULL", size);
        }
        memset(held[i], 0xff, size);
    }
    for (int i = 0; i < HELD; i++) {
        free(held[i]);
    }
    return NULL;
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    pthread_t threads[3];
    for (int pass = 0; pass < 3; pass++) {
        for (size_t i = 0; i < 3; i++) {
            REQUIRE(pthread_create(&threads[i], NULL, worker, (void *)(i + 1)) == 0, "pthread_create failed");
        }
        for (int i = 0; i < 3; i++) {
            pthread_join(threads[i], NULL);
        }
        /* Long enough for decay to give the memory back in between. */
        usleep(400 * 1000);
    }
    return check_result();
}
