/* Blocks of every size allocated by one thread, checked and freed by another, in both directions. */
#include "check.h"
#include <pthread.h>

enum { RING = 256, BLOCKS = 60000 };

struct block {
    size_t size;
    size_t seed;
    unsigned char payload[];
};

struct channel {
    _Atomic(struct block *) slots[RING];
};
static struct channel channels[2];

static size_t pick_size(uint64_t *random) {
    uint64_t kind = next_random(random) % 1000;
    return kind < 900 ? next_random(random) % 2000 + 1
         : kind < 997 ? next_random(random) % (60 * KIB) + 1
                      : next_random(random) % (3 * MIB) + 1;
}

static void *worker(void *argument) {
    size_t me = (size_t)argument;
    uint64_t random = 1234567 + me;
    size_t sent = 0, received = 0;
    while (sent < BLOCKS || received < BLOCKS) {
        bool moved = false;
        if (sent < BLOCKS && atomic_load_explicit(&channels[me].slots[sent % RING], memory_order_acquire) == NULL) {
            size_t size = pick_size(&random);
            struct block *block = malloc(sizeof *block + size);
            REQUIRE(block != NULL, "malloc(%zu) returned NULL", sizeof *block + size);
            block->size = size;
            block->seed = sent * 2 + me;
            /* Ends and a middle: filling megabytes would only measure memory. */
            size_t edge = size < 64 ? size : 64;
            pattern_fill(block->payload, block->seed, 0, edge);
            pattern_fill(block->payload, block->seed, size - edge, size);
            atomic_store_explicit(&channels[me].slots[sent % RING], block, memory_order_release);
            sent++;
            moved = true;
        }
        _Atomic(struct block *) *slot = &channels[1 - me].slots[received % RING];
        struct block *block = received < BLOCKS ? atomic_load_explicit(slot, memory_order_acquire) : NULL;
        if (block != NULL) {
            atomic_store_explicit(slot, NULL, memory_order_release);
            size_t edge = block->size < 64 ? block->size : 64;
            CHECK(block->seed == received * 2 + (1 - me), "thread %zu received block %zu out of order", me, block->seed);
            CHECK(pattern_verify(block->payload, block->seed, 0, edge) == edge &&
                      pattern_verify(block->payload, block->seed, block->size - edge, block->size) == block->size,
                  "thread %zu received a block of %zu bytes that changed on the way", me, block->size);
            if (received % 16 == 0) {
                block = realloc(block, sizeof *block + block->size + 500);
                REQUIRE(block != NULL, "realloc of a foreign thread's block returned NULL");
            }
            free(block);
            received++;
            moved = true;
        }
        if (!moved) {
            sched_yield();
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    pthread_t threads[2];
    for (size_t i = 0; i < 2; i++) {
        REQUIRE(pthread_create(&threads[i], NULL, worker, (void *)i) == 0, "pthread_create failed");
    }
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    return check_result();
}
