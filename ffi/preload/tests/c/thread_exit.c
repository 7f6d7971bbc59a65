/* Threads end in every order of their destructors, and those allocate and free: the allocator's own
 * per-thread state must outlive, or come back for, the last of them. */
#include "check.h"
#include <pthread.h>

/* More than 32 keys: beyond that glibc keeps a thread's values in a calloc'd table, which it frees
 * after the last destructor has run. */
enum { KEYS = 80, ROUNDS = 3, THREADS = 120 };
static pthread_key_t keys[KEYS];
static atomic_int destructor_calls;

struct value {
    int key;
    int rounds_left;
    unsigned char *payload;
    size_t size;
};

static struct value *make_value(int key, int rounds_left) {
    struct value *value = malloc(sizeof *value);
    REQUIRE(value != NULL, "malloc in a thread failed");
    value->key = key;
    value->rounds_left = rounds_left;
    value->size = 10 + (size_t)key * 37 + (key % 16 == 0 ? 200 * KIB : 0);
    value->payload = malloc(value->size);
    REQUIRE(value->payload != NULL, "malloc(%zu) in a thread failed", value->size);
    pattern_fill(value->payload, (size_t)key, 0, value->size);
    return value;
}

static void destroy(void *argument) {
    struct value *value = argument;
    atomic_fetch_add(&destructor_calls, 1);
    CHECK(pattern_verify(value->payload, (size_t)value->key, 0, value->size) == value->size,
          "the value of key %d changed before its destructor ran", value->key);
    if (value->rounds_left > 0) {
        /* Set again: the destructor runs once more, up to PTHREAD_DESTRUCTOR_ITERATIONS times. */
        pthread_setspecific(keys[value->key], make_value(value->key, value->rounds_left - 1));
    }
    void *scratch = calloc(3, 1000);
    scratch = realloc(scratch, 9000);
    CHECK(scratch != NULL, "allocating in a destructor failed");
    free(scratch);
    free(value->payload);
    free(value);
}

static void *worker(void *argument) {
    size_t thread = (size_t)argument;
    /* Some threads end before they ever allocated themselves: then a destructor's malloc is the first. */
    for (int i = 0; i < KEYS; i++) {
        int key = thread % 2 ? i : KEYS - 1 - i;
        if (thread % 7 != 0 || key == 40) {
            pthread_setspecific(keys[key], make_value(key, (int)(thread + (size_t)key) % ROUNDS));
        }
    }
    if (thread % 5 == 0) {
        pthread_exit(NULL);
    }
    return NULL;
}

static void *detached_worker(void *argument) {
    worker(argument);
    return NULL;
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    for (int i = 0; i < KEYS; i++) {
        REQUIRE(pthread_key_create(&keys[i], destroy) == 0, "pthread_key_create failed");
    }
    int expected = 0;
    for (size_t base = 0; base < THREADS; base += 12) {
        pthread_t threads[12];
        for (size_t i = 0; i < 12; i++) {
            REQUIRE(pthread_create(&threads[i], NULL, worker, (void *)(base + i)) == 0, "pthread_create failed");
        }
        for (size_t i = 0; i < 12; i++) {
            pthread_join(threads[i], NULL);
        }
    }
    for (size_t thread = 0; thread < THREADS; thread++) {
        for (int key = 0; key < KEYS; key++) {
            if (thread % 7 != 0 || key == 40) {
                expected += 1 + (int)(thread + (size_t)key) % ROUNDS;
            }
        }
    }
    CHECK(destructor_calls == expected, "%d destructors ran instead of %d", destructor_calls, expected);

    /* Detached, and still in their destructors when the process ends. */
    pthread_attr_t detached;
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    for (size_t i = 0; i < 16; i++) {
        pthread_t thread;
        REQUIRE(pthread_create(&thread, &detached, detached_worker, (void *)(i + 1)) == 0, "pthread_create failed");
    }
    return check_result();
}
