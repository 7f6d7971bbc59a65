/* A program that forks, with so many MiB on its heap (the first argument), so many times (the second), while so many
 * threads allocate (the third). What each child sees is the heap as of its fork, whatever its parent, its siblings and
 * its own children write meanwhile. The fourth argument: "orphan": the parent ends at once, and
 * its child makes a file (the fifth argument) if all is well; "later": forks when there is a file; "hold": one child, and
 * neither looks at its heap before there is a file; "time": forks and says how long that took; "kill": children are killed
 * while they read. Says "ready" before the first fork and "intact" at the end. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 256 << 10, WORDS = BLOCK / sizeof(long), STEP = 4096 / sizeof(long), PATIENCE = 240 };
static long **blocks;
static int count;
static volatile int stop;

static void say(const char *text) {
    if (write(1, text, strlen(text)) < 0) _exit(9);
}

static void fail(const char *what, long number) {
    char text[200];
    snprintf(text, sizeof text, "%s (%ld): %s\n", what, number, strerror(errno));
    if (write(2, text, strlen(text)) < 0) _exit(9);
    _exit(1);
}

/* One word of every page says the number, and which block it is. */
static void put(long number, int from, int step) {
    for (int i = from; i < count; i += step)
        for (int w = 0; w < WORDS; w += STEP) blocks[i][w] = number * count + i;
}

static void check(const char *who, long number, int from, int step) {
    for (int i = from; i < count; i += step)
        for (int w = 0; w < WORDS; w += STEP)
            if (blocks[i][w] != number * count + i) fail(who, blocks[i][w] - (number * count + i));
}

static void *allocate(void *seed) {
    unsigned long r = (unsigned long)seed;
    char *kept[64] = {0};
    int size[64] = {0};
    while (!stop) {
        r = r * 6364136223846793005ul + 1;
        int i = r >> 58, bytes = 16 + (r >> 33) % (256 << 10);
        if (kept[i] && (kept[i][0] != (char)i || kept[i][size[i] - 1] != (char)i)) fail("a thread's block", i);
        free(kept[i]);
        kept[i] = malloc(bytes);
        if (!kept[i]) fail("malloc", bytes);
        memset(kept[i], i, bytes);
        size[i] = bytes;
        if (i == 0) usleep(200);
    }
    for (int i = 0; i < 64; i++) free(kept[i]);
    return NULL;
}

static void use_heap(void) {
    char *some[100];
    for (int i = 0; i < 100; i++) {
        some[i] = malloc(1000 * (i + 1));
        if (!some[i]) fail("a child's malloc", i);
        memset(some[i], i, 1000 * (i + 1));
    }
    for (int i = 0; i < 100; i++) {
        if (some[i][999 * (i + 1)] != i) fail("a child's block", i);
        free(some[i]);
    }
}

static pid_t start(void) {
    pid_t pid = fork();
    if (pid < 0) fail("fork", 0);
    if (pid == 0) alarm(PATIENCE);
    return pid;
}

static void end(const char *who, pid_t pid) {
    int status;
    if (waitpid(pid, &status, 0) != pid || status != 0) fail(who, status);
}

/* A child: reads, allocates, writes, and forks in turn. */
static void child(long number) {
    int mine = number % 7, other = (number + 1) % 7;
    check("a child", number, mine, 7);
    use_heap();
    pid_t pid = start();
    if (pid == 0) {
        check("a grandchild", number, other, 7);
        put(-number, mine, 7);
        use_heap();
        check("a grandchild at last", -number, mine, 7);
        _exit(0);
    }
    put(number + 1000, other, 7);
    end("the grandchild", pid);
    check("a child at last", number + 1000, other, 7);
    check("a child at last", number, mine, 7);
}

static void await(const char *file) {
    while (access(file, F_OK) != 0) usleep(20000);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

int main(int argc, char **argv) {
    int mib = atoi(argv[1]), forks = atoi(argv[2]), threads = atoi(argv[3]);
    const char *how = argc > 4 ? argv[4] : "";
    alarm(PATIENCE * 2);
    count = mib * 4;
    blocks = mmap(NULL, count * sizeof *blocks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < count; i++) {
        blocks[i] = malloc(BLOCK);
        if (!blocks[i]) fail("malloc", i);
        memset(blocks[i], 0, BLOCK);
    }
    put(1, 0, 1);
    pthread_t thread[16];
    for (long i = 0; i < threads; i++)
        if (pthread_create(&thread[i], NULL, allocate, (void *)(i + 1))) fail("pthread_create", i);
    if (!strcmp(how, "time")) usleep(300000);
    say("ready\n");
    long number = 1;
    if (!strcmp(how, "later")) await(argv[5]);
    if (!strcmp(how, "hold")) {
        pid_t pid = start();
        await(argv[5]);
        if (pid == 0) {
            check("the child that waited", 1, 0, 1);
            _exit(0);
        }
        put(2, 0, 3);
        end("the child that waited", pid);
        check("its parent", 2, 0, 3);
        check("its parent", 1, 1, 3);
        check("its parent", 1, 2, 3);
        forks = 0;
    }
    for (int i = 0; i < forks; i++) {
        double begin = now();
        pid_t pid = start();
        double took = now() - begin;
        if (pid == 0) {
            if (!strcmp(how, "time")) _exit(0);
            if (!strcmp(how, "kill")) {
                for (;;) check("a child to be killed", number, 0, 1);
            }
            if (!strcmp(how, "orphan")) {
                setsid();
                usleep(300000);
            }
            child(number);
            if (!strcmp(how, "orphan")) close(open(argv[5], O_CREAT | O_WRONLY, 0600));
            _exit(0);
        }
        if (!strcmp(how, "time")) {
            char text[80];
            snprintf(text, sizeof text, "%.3f\n", took);
            say(text);
        }
        if (!strcmp(how, "orphan")) _exit(0);
        number++;
        put(number, 0, 1);
        if (!strcmp(how, "kill")) {
            usleep(i * 300);
            kill(pid, SIGKILL);
            waitpid(pid, NULL, 0);
        } else {
            end("the child", pid);
        }
        check("the parent", number, 0, 1);
    }
    stop = 1;
    for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    say("intact\n");
    return 0;
}
