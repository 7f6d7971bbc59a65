/* Hundreds of threads come and go, on small stacks, leaving blocks behind for others to free: no thread
 * takes memory with it. */
#include "check.h"
#include <limits.h>
#include <pthread.h>

enum { WAVES = 40, WAVE = 24, LEFT = 40 };
static void *left_behind[WAVE][LEFT];

static void *worker(void *argument) {
    size_t thread = (size_t)argument;
    uint64_t random = thread * 7919 + 1;
    /* What the same slot's thread of the last wave left. */
    for (int i = 0; i < LEFT; i++) {
        free(left_behind[thread % WAVE][i]);
    }
    for (int i = 0; i < 300; i++) {
        size_t size = next_random(&random) % 3000 + 1;
        unsigned char *block = malloc(size);
        REQUIRE(block != NULL, "malloc(%zu) returned NULL", size);
        block[0] = block[size - 1] = 1;
        free(block);
    }
    for (int i = 0; i < LEFT; i++) {
        size_t size = i == 0 ? 256 * KIB : next_random(&random) % 5000 + 1;
        left_behind[thread % WAVE][i] = malloc(size);
        REQUIRE(left_behind[thread % WAVE][i] != NULL, "malloc(%zu) returned NULL", size);
        memset(left_behind[thread % WAVE][i], 1, size);
    }
    return NULL;
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    pthread_attr_t small_stacks;
    pthread_attr_init(&small_stacks);
    /* Little beyond what the system insists on: an allocator must not need a deep stack. */
    REQUIRE(pthread_attr_setstacksize(&small_stacks, (size_t)PTHREAD_STACK_MIN + 16 * KIB) == 0,
            "pthread_attr_setstacksize failed");
    long settled = 0;
    for (size_t wave = 0; wave < WAVES; wave++) {
        pthread_t threads[WAVE];
        for (size_t i = 0; i < WAVE; i++) {
            int error = pthread_create(&threads[i], &small_stacks, worker, (void *)(wave * WAVE + i));
            REQUIRE(error == 0, "pthread_create returned %d after %zu threads", error, wave * WAVE + i);
        }
        for (size_t i = 0; i < WAVE; i++) {
            pthread_join(threads[i], NULL);
        }
        if (wave == WAVES / 4) {
            settled = status_kib("VmRSS:");
        }
    }
    long grown = status_kib("VmRSS:") - settled;
    CHECK(grown < 32 * 1024, "the last %d threads grew the process by %ld KiB", WAVES * 3 / 4 * WAVE, grown);
    for (int i = 0; i < WAVE; i++) {
        for (int j = 0; j < LEFT; j++) {
            free(left_behind[i][j]);
        }
    }
    return check_result();
}
