/* A key-value store: a hash table of chained records with values of 64 to 1,024 bytes. Nine operations in ten
 * read a record and check all of its value, one replaces it by another of another size.
 *
 * usage: kv [SECONDS] */
#include "program.h"

enum { KEYS = 4000, BUCKETS = 2048, SMALLEST = 8, LARGEST = 128 };

struct record {
    struct record *next;
    uint64_t key, seed;
    size_t words;
    uint64_t value[];
};

static struct record **buckets;

static struct record **find(uint64_t key) {
    struct record **at = &buckets[key * 0x9e3779b97f4a7c15 >> 53];
    while (*at != NULL && (*at)->key != key) {
        at = &(*at)->next;
    }
    return at;
}

static void put(uint64_t key, uint64_t *random) {
    size_t words = SMALLEST + next_random(random) % (LARGEST - SMALLEST + 1);
    struct record **at = find(key), *record = malloc(sizeof *record + words * sizeof record->value[0]);
    if (record == NULL) {
        fail("out of memory");
    }
    *record = (struct record){.key = key, .seed = next_random(random), .words = words};
    for (size_t i = 0; i < words; i++) {
        record->value[i] = record->seed + i;
    }
    struct record *old = *at;
    if (old != NULL) {
        record->next = old->next;
    }
    *at = record;
    free(old);
}

static void get(uint64_t key) {
    const struct record *record = *find(key);
    if (record == NULL) {
        fail("a record is gone");
    }
    for (size_t i = 0; i < record->words; i++) {
        if (record->value[i] != record->seed + i) {
            fail("a record was damaged");
        }
    }
}

int main(int argc, char **argv) {
    double duration = argc > 1 ? atof(argv[1]) : 10;
    uint64_t random = 88172645463325252, operations = 0;
    buckets = calloc(BUCKETS, sizeof *buckets);
    if (buckets == NULL) {
        fail("out of memory");
    }
    for (uint64_t key = 0; key < KEYS; key++) {
        put(key, &random);
    }
    double start = seconds_now(), elapsed;
    do {
        for (int i = 0; i < 100; i++) {
            uint64_t key = next_random(&random) % KEYS;
            if (next_random(&random) % 10 == 0) {
                put(key, &random);
            } else {
                get(key);
            }
        }
        operations += 100;
        elapsed = seconds_now() - start;
    } while (elapsed < duration);
    result("ops_per_second", (double)operations / elapsed);
    return 0;
}
