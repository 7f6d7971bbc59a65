/* fork while other threads allocate and while others hold stdio's locks: the child can allocate, use
 * stdio and exit, and the parent goes on. A library that takes its own locks around fork without
 * regard to the locks that fork itself takes (stdio's list) deadlocks here. */
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { FORKS = 200, ALLOCATORS = 2, THREADS = ALLOCATORS + 4 };
enum { LONG_LINE = 30000 };
static char long_line[64];
static atomic_bool stop;
static atomic_long progress[5];

static void *allocating(void *argument) {
    size_t me = (size_t)argument;
    uint64_t random = me * 31 + 7;
    void *blocks[64] = {0};
    while (!atomic_load(&stop)) {
        size_t i = next_random(&random) % 64;
        free(blocks[i]);
        blocks[i] = malloc(next_random(&random) % 4000 + 1);
        REQUIRE(blocks[i] != NULL, "malloc returned NULL");
        *(char *)blocks[i] = 1;
        atomic_fetch_add(&progress[me], 1);
    }
    for (int i = 0; i < 64; i++) {
        free(blocks[i]);
    }
    return NULL;
}

/* fflush(NULL) holds the list of streams and waits for each stream. */
static void *flushing(void *argument) {
    (void)argument;
    while (!atomic_load(&stop)) {
        fflush(NULL);
        atomic_fetch_add(&progress[2], 1);
    }
    return NULL;
}

/* The first getc of a stream allocates its buffer while it holds the stream; fopen and fclose change
 * the list. */
static void *reading(void *argument) {
    (void)argument;
    while (!atomic_load(&stop)) {
        FILE *file = fopen("/dev/zero", "r");
        REQUIRE(file != NULL, "fopen(/dev/zero) failed");
        CHECK(getc(file) == 0, "getc from /dev/zero");
        fclose(file);
        atomic_fetch_add(&progress[3], 1);
    }
    return NULL;
}

/* getline grows its result while it holds the stream, and soon needs more than a thread's cache holds.
 * The line stays below 64 KiB, so that with `size:64K` nothing that the child may meet lies on extents. */
static void *growing(void *argument) {
    (void)argument;
    while (!atomic_load(&stop)) {
        FILE *file = fopen(long_line, "r");
        REQUIRE(file != NULL, "fopen(%s) failed", long_line);
        char *line = NULL;
        size_t room = 0;
        CHECK(getline(&line, &room, file) == LONG_LINE + 1, "getline did not read the whole line");
        fclose(file);
        free(line);
        atomic_fetch_add(&progress[4], 1);
    }
    return NULL;
}

static void child(const unsigned char *inherited) {
    if (pattern_verify(inherited, 9, 0, 5000) != 5000) {
        _exit(2);
    }
    for (size_t size = 1; size < 3000; size += 37) {
        unsigned char *block = malloc(size);
        if (block == NULL) {
            _exit(3);
        }
        block[0] = block[size - 1] = 1;
        free(block);
    }
    FILE *file = fopen("/dev/null", "w");
    if (file == NULL || fprintf(file, "%d\n", 42) != 3 || fclose(file) != 0) {
        _exit(4);
    }
    _exit(0);
}

/* The status, or -1 when the child is still there after 20 seconds. */
static int wait_bounded(pid_t pid) {
    int status;
    for (int waited = 0; waited < 20000; waited++) {
        pid_t ended = waitpid(pid, &status, WNOHANG);
        REQUIRE(ended >= 0, "waitpid failed");
        if (ended == pid) {
            return status;
        }
        usleep(1000);
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    return -1;
}

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    int file = memfd_create("long line", 0);
    REQUIRE(file >= 0, "memfd_create failed");
    snprintf(long_line, sizeof long_line, "/proc/self/fd/%d", file);
    for (int i = 0; i <= LONG_LINE; i++) {
        REQUIRE(write(file, i < LONG_LINE ? "x" : "\n", 1) == 1, "write failed");
    }
    unsigned char *inherited = malloc(5000);
    REQUIRE(inherited != NULL, "malloc(5000) returned NULL");
    pattern_fill(inherited, 9, 0, 5000);
    static void *(*const WORK[THREADS])(void *) = {allocating, allocating, flushing, reading, growing, growing};
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++) {
        REQUIRE(pthread_create(&threads[i], NULL, WORK[i], (void *)i) == 0, "pthread_create failed");
    }

    for (int i = 0; i < FORKS; i++) {
        pid_t pid = fork();
        REQUIRE(pid >= 0, "fork %d failed", i);
        if (pid == 0) {
            child(inherited);
        }
        int status = wait_bounded(pid);
        CHECK(status != -1, "child %d did not end within 20 s: deadlock", i);
        CHECK(status == -1 || (WIFEXITED(status) && WEXITSTATUS(status) == 0), "child %d ended with status %#x", i, status);
        void *block = malloc(1000);
        CHECK(block != NULL, "the parent cannot allocate after fork %d", i);
        free(block);
        if (check_result() != 0) {
            break;
        }
    }
    /* Nobody was left waiting for a lock that fork took. */
    long before[5];
    for (int i = 0; i < 5; i++) {
        before[i] = progress[i];
    }
    for (int waited = 0; waited < 5000; waited++) {
        bool all = true;
        for (int i = 0; i < 5; i++) {
            all &= progress[i] > before[i];
        }
        if (all) {
            break;
        }
        usleep(1000);
    }
    for (int i = 0; i < 5; i++) {
        CHECK(progress[i] > before[i], "thread %d of the parent stands still after the forks", i);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < THREADS && check_result() == 0; i++) {
        pthread_join(threads[i], NULL);
    }
    free(inherited);
    return check_result();
}
