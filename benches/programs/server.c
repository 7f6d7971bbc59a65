/* A server's heap: two threads hand objects of 16 to 4,000 bytes to each other. Each keeps a set of live
 * objects, replaces a random one by what it receives and frees the one replaced, so that nearly every
 * free is of memory the other thread allocated. Runs for a fixed time and counts allocations.
 *
 * usage: server [SECONDS] */
#include "program.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

enum { RING = 512, LIVE = 4000 };

/* One producer, one consumer; a slot is empty when it is NULL. Each end counts for itself. */
struct ring {
    _Atomic(unsigned char *) slots[RING];
} __attribute__((aligned(128)));

static struct ring rings[2];
static atomic_bool stop;

struct worker {
    size_t index;
    uint64_t operations;
} __attribute__((aligned(128)));

static unsigned char *make_object(uint64_t *random) {
    size_t size = 16 + next_random(random) % (4000 - 16 + 1);
    unsigned char *object = malloc(size);
    if (object == NULL) {
        fail("out of memory");
    }
    object[0] = (unsigned char)size;
    object[size - 1] = object[0];
    return object;
}

static void *work(void *argument) {
    struct worker *me = argument;
    struct ring *out = &rings[me->index], *in = &rings[1 - me->index];
    unsigned char **live = calloc(LIVE, sizeof *live);
    uint64_t random = 1000003 * (me->index + 1), sent = 0, received = 0;
    if (live == NULL) {
        fail("out of memory");
    }
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        int moved = 0;
        if (atomic_load_explicit(&out->slots[sent % RING], memory_order_acquire) == NULL) {
            atomic_store_explicit(&out->slots[sent++ % RING], make_object(&random), memory_order_release);
            moved = 1;
        }
        unsigned char *object = atomic_load_explicit(&in->slots[received % RING], memory_order_acquire);
        if (object != NULL) {
            atomic_store_explicit(&in->slots[received++ % RING], NULL, memory_order_release);
            size_t at = next_random(&random) % LIVE;
            free(live[at]);
            live[at] = object;
            moved = 1;
        }
        if (!moved) {
            sched_yield();
        }
    }
    me->operations = sent;
    for (int i = 0; i < LIVE; i++) {
        free(live[i]);
    }
    free(live);
    return NULL;
}

int main(int argc, char **argv) {
    double duration = argc > 1 ? atof(argv[1]) : 10;
    struct worker workers[2] = {{.index = 0}, {.index = 1}};
    pthread_t threads[2];
    double start = seconds_now();
    for (int i = 0; i < 2; i++) {
        if (pthread_create(&threads[i], NULL, work, &workers[i]) != 0) {
            fail("pthread_create failed");
        }
    }
    struct timespec pause = {(time_t)duration, (long)((duration - (double)(time_t)duration) * 1e9)};
    nanosleep(&pause, NULL);
    atomic_store(&stop, 1);
    double elapsed = seconds_now() - start;
    for (int i = 0; i < 2; i++) {
        pthread_join(threads[i], NULL);
    }
    result("ops_per_second", (double)(workers[0].operations + workers[1].operations) / elapsed);
    for (int i = 0; i < RING; i++) {
        free(atomic_load(&rings[0].slots[i]));
        free(atomic_load(&rings[1].slots[i]));
    }
    return 0;
}
