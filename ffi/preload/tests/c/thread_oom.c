/* Several threads run out of memory at once, under RLIMIT_AS: NULL and ENOMEM, blocks already held stay
 * whole, nothing deadlocks, and after the frees allocation works again.
 *
 * First with the limit set on the running process, as a program does to itself; then again in a fresh
 * image that starts under the limit (`ulimit -v`), where even the allocator's own start must fit it. */
#include "check.h"
#include <pthread.h>
#include <sys/resource.h>

enum { THREADS = 4, MAX_BLOCKS = 4096 };
#define BLOCK (300 * KIB)
/* A reservation made before the limit may go on serving; nobody is to fill the machine to find out. */
#define SHARE (192 * MIB)

static pthread_barrier_t barrier;
static atomic_int refused;
static bool refusal_due;

static void *exhaust(void *argument) {
    size_t thread = (size_t)argument;
    static _Thread_local unsigned char *blocks[MAX_BLOCKS];
    for (int round = 0; round < 3; round++) {
        pthread_barrier_wait(&barrier);
        size_t count = 0;
        while (count < MAX_BLOCKS && count * BLOCK < SHARE) {
            errno = 0;
            unsigned char *block = count % 2 ? malloc(BLOCK) : calloc(1, BLOCK);
            if (block == NULL) {
                CHECK(errno == ENOMEM, "thread %zu: NULL with errno %d instead of ENOMEM", thread, errno);
                atomic_fetch_add(&refused, 1);
                break;
            }
            pattern_fill(block, thread * MAX_BLOCKS + count, 0, 64);
            pattern_fill(block, thread * MAX_BLOCKS + count, BLOCK - 64, BLOCK);
            blocks[count++] = block;
        }
        /* At the limit: large requests fail everywhere, growing what is held keeps it whole. */
        for (int i = 0; i < 50; i++) {
            errno = 0;
            void *block = malloc((size_t)1 << 46);
            CHECK(block == NULL && errno == ENOMEM, "thread %zu: malloc of 64 TiB returned %p with errno %d", thread,
                  block, errno);
            free(block);
        }
        if (count > 0) {
            void *moved = realloc(blocks[0], (size_t)1 << 46);
            CHECK(moved == NULL, "thread %zu: realloc to 64 TiB returned %p", thread, moved);
        }
        for (size_t i = 0; i < count; i++) {
            size_t seed = thread * MAX_BLOCKS + i;
            CHECK(pattern_verify(blocks[i], seed, 0, 64) == 64 && pattern_verify(blocks[i], seed, BLOCK - 64, BLOCK) == BLOCK,
                  "thread %zu: block %zu lost its content", thread, i);
            free(blocks[i]);
        }
        pthread_barrier_wait(&barrier);
        void *block = malloc(BLOCK);
        CHECK(block != NULL, "thread %zu: malloc fails after everything was freed", thread);
        free(block);
    }
    return NULL;
}

static void limit_address_space(size_t bytes) {
    struct rlimit limit = {bytes, bytes};
    REQUIRE(setrlimit(RLIMIT_AS, &limit) == 0, "setrlimit(RLIMIT_AS, %zu) failed", bytes);
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    bool born_limited = argc > 1 && strcmp(argv[argc - 1], "--born-limited") == 0;
    refusal_due = born_limited;

    pthread_t threads[THREADS];
    pthread_attr_t small_stacks;
    pthread_attr_init(&small_stacks);
    pthread_attr_setstacksize(&small_stacks, 128 * KIB);
    pthread_barrier_init(&barrier, NULL, THREADS + 1);
    for (size_t i = 0; i < THREADS; i++) {
        REQUIRE(pthread_create(&threads[i], &small_stacks, exhaust, (void *)i) == 0, "pthread_create failed");
    }
    if (!born_limited) {
        struct rlimit soft;
        getrlimit(RLIMIT_AS, &soft);
        soft.rlim_cur = (size_t)status_kib("VmSize:") * KIB + 64 * MIB;
        REQUIRE(setrlimit(RLIMIT_AS, &soft) == 0, "setrlimit(RLIMIT_AS) failed");
    }
    for (int round = 0; round < 3; round++) {
        pthread_barrier_wait(&barrier);
        pthread_barrier_wait(&barrier);
    }
    for (int i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
    }
    CHECK(!refusal_due || atomic_load(&refused) > 0, "768 MiB were given out under RLIMIT_AS of 512 MiB");
    if (born_limited || check_result() != 0) {
        return check_result();
    }
    limit_address_space(512 * MIB);
    execv("/proc/self/exe", (char *[]){argv[0], on_glibc ? "--on-glibc" : "--", "--born-limited", NULL});
    REQUIRE(false, "execv of myself failed");
}
