/* A program that forks, with so many MiB on its heap (the first argument), so many times (the second), while so many
 * threads allocate (the third). What each child sees is the heap as of its fork, whatever its parent, its siblings and
 * its own children write meanwhile. The fourth argument says how, the fifth names a file:
 *   storm   ends after so many seconds (the sixth argument) at the latest, and waits for the file with all at rest
 *   orphan  the parent ends at once, and its child makes the file if all is well
 *   later   forks when there is the file
 *   hold    one child, and neither looks at its heap before there is the file
 *   split   the same, and then each makes several mappings of what it has not touched
 *   bereft  the same, and the parent, which looks at nothing, is killed before: its child makes FILE.well
 *   rest    one child, which is killed; the parent has not looked at its heap before there is the file
 *   kept    the same, and the parent has made some pages of its heap read-only, which stay so
 *   heirs   a child that has its own copy of a third forks, and its child frees most of that without having looked
 *   kill    children are killed while they read
 *   cost    says how long forks take, in turns of ordinary memory and of its heap, for every 16 MiB of which it has
 *           waited so many milliseconds, instead of a file
 *   touch   says how much memory a child takes for how much it touches
 * Says "ready" before the first fork and "intact" at the end. */
#define _GNU_SOURCE
#include <dirent.h>
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
/* What is in each, in memory that is no heap. */
static long *is;
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

/* Whether a block is of a third of the heap, in pieces that are larger than what is copied at once; -1: of all. */
static int of(int third, int i) { return third < 0 || i / 16 % 3 == third; }

/* One word of every page says the number, and which block it is. */
static void put(long number, int third) {
    for (int i = 0; i < count; i++) {
        if (!of(third, i)) continue;
        is[i] = number * count + i;
        for (int w = 0; w < WORDS; w += STEP) blocks[i][w] = is[i];
    }
}

static void check(const char *who, int third) {
    for (int i = 0; i < count; i++)
        for (int w = 0; of(third, i) && w < WORDS; w += STEP)
            if (blocks[i][w] != is[i]) fail(who, blocks[i][w] - is[i]);
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
    int mine = number % 3, other = (number + 1) % 3;
    check("a child", mine);
    use_heap();
    pid_t pid = start();
    if (pid == 0) {
        check("a grandchild", other);
        put(-number, mine);
        use_heap();
        check("a grandchild at last", -1);
        _exit(0);
    }
    put(number + 1000, other);
    end("the grandchild", pid);
    check("a child at last", -1);
}

static void await(const char *file) {
    while (access(file, F_OK) != 0) usleep(20000);
}

static void make(const char *file) { close(open(file, O_CREAT | O_WRONLY, 0600)); }

/* Entries of the descriptor tables of all threads; those of the library have one of their own. */
static int descriptors(void) {
    int all = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *task; (task = readdir(tasks));) {
        char path[300];
        snprintf(path, sizeof path, "/proc/self/task/%s/fd", task->d_name);
        DIR *fds = task->d_name[0] == '.' ? NULL : opendir(path);
        while (fds && readdir(fds)) all++;
        if (fds) closedir(fds);
    }
    closedir(tasks);
    return all;
}

/* KiB in a line of a file of /proc/self, all such lines together. */
static long kib(const char *file, const char *key) {
    long all = 0;
    char line[300];
    FILE *f = fopen(file, "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, key, strlen(key))) all += atol(line + strlen(key));
    if (f) fclose(f);
    return all;
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void print(const char *what, double number) {
    char text[100];
    snprintf(text, sizeof text, "%s %.3f\n", what, number);
    say(text);
}

/* fork(2) of as much ordinary memory in 4 KiB pages as the heap has, and of the heap, in turns. */
static void cost(size_t bytes, int forks) {
    char *plain = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (plain == MAP_FAILED || madvise(plain, bytes, MADV_NOHUGEPAGE)) fail("mmap", 0);
    memset(plain, 1, bytes);
    for (int i = 0; i < 2 * forks; i++) {
        int ours = i % 2;
        if (madvise(plain, bytes, ours ? MADV_DONTFORK : MADV_DOFORK)) fail("madvise", i);
        /* In this process's page tables, as memory in use is. */
        check("itself", -1);
        if (ours) print("mapped", kib("/proc/self/smaps", "ShmemPmdMapped:"));
        double begin = now();
        /* No handler runs at _Fork, and no extent is inherited. */
        pid_t pid = ours ? fork() : _Fork();
        double took = now() - begin;
        if (pid == 0) _exit(0);
        if (pid < 0) fail("fork", i);
        print(ours ? "heap" : "plain", took);
        end("the child", pid);
        /* What nobody has touched is the parent's again. */
        if (ours) usleep(700000);
    }
}

/* What a child takes for having touched some of the heap. */
static void touch(int mib) {
    for (int touched = mib / 8; touched < mib; touched *= 2) {
        pid_t pid = start();
        if (pid == 0) {
            const char *file = "/proc/self/smaps_rollup";
            long before = kib(file, "Anonymous:");
            print("before", before);
            count = touched * 4;
            check("a child", -1);
            print("touched", touched * 1024);
            print("grew", kib(file, "Anonymous:") - before);
            _exit(0);
        }
        end("the child", pid);
    }
}

/* Makes several mappings of most granules, or has the kernel make them one again. */
static void split(int many) {
    for (int i = 0; i < count; i += 4) {
        void *page = (void *)((unsigned long)blocks[i] & ~4095ul);
        int failed = 0;
        if (i / 4 % 3 == 0) failed = many ? mlock(page, 4096) : munlock(page, 4096);
        if (i / 4 % 3 == 1) failed = mprotect(page, 4096, many ? PROT_READ : PROT_READ | PROT_WRITE);
        if (i / 4 % 3 == 2) failed = madvise(page, 4096, many ? MADV_DONTDUMP : MADV_DODUMP);
        if (failed) fail("split", i);
    }
}

/* Whether the kernel may not write to a page, which is all that can be seen of it without a signal. */
static int is_read_only(void *page) {
    int zero = open("/dev/zero", O_RDONLY);
    int refused = read(zero, page, 1) < 0 && errno == EFAULT;
    close(zero);
    return refused;
}

static void look_around(const char *how, const char *file) {
    int kept = !strcmp(how, "kept"), rest = kept || !strcmp(how, "rest"), bereft = !strcmp(how, "bereft");
    void *page = (void *)((unsigned long)blocks[count / 2] & ~4095ul);
    int parts = !strcmp(how, "split");
    pid_t pid = start();
    if (pid == 0) {
        if (bereft) setsid();
        if (rest) pause();
        await(file);
        if (parts) split(1);
        check("the child that waited", -1);
        if (bereft) {
            char well[300];
            snprintf(well, sizeof well, "%s.well", file);
            make(well);
        }
        _exit(0);
    }
    if (bereft) pause();
    if (rest) {
        if (kept && mprotect(page, 4096, PROT_READ)) fail("mprotect", 0);
        usleep(300000);
        kill(pid, SIGKILL);
        if (waitpid(pid, NULL, 0) != pid) fail("waitpid", 0);
        say("alone\n");
    }
    await(file);
    if (kept && !is_read_only(page)) fail("a page can be written to", 0);
    if (kept && mprotect(page, 4096, PROT_READ | PROT_WRITE)) fail("mprotect", 1);
    if (parts) {
        split(1);
        check("its parent, in parts", -1);
        split(0);
    }
    put(2, 0);
    if (!rest) end("the child that waited", pid);
    check("its parent", -1);
}

/* Frees most of what came from the child, which nobody has looked at here, and takes as much anew. */
static void renew(void) {
    for (int i = 0; i < count; i++)
        if (of(0, i) && (i / 16 % 2 || i % 4)) free(blocks[i]);
    usleep(500000);
    for (int i = 0; i < count; i++) {
        if (!of(0, i) || !(i / 16 % 2 || i % 4)) continue;
        blocks[i] = calloc(WORDS, sizeof(long));
        if (!blocks[i]) fail("calloc", i);
        is[i] = 0;
    }
}

/* What the child has copies of comes to extents of its own, and is shared with its child by another fork server. */
static void heirs(void) {
    pid_t pid = start();
    if (pid == 0) {
        check("the child", 0);
        use_heap();
        usleep(2000000);
        pid = start();
        if (pid == 0) {
            use_heap();
            usleep(1000000);
            renew();
            check("the grandchild", -1);
            _exit(0);
        }
        end("the grandchild", pid);
        check("the child at last", -1);
        _exit(0);
    }
    end("the child", pid);
    check("the parent", -1);
}

int main(int argc, char **argv) {
    int mib = atoi(argv[1]), forks = atoi(argv[2]), threads = atoi(argv[3]);
    const char *how = argc > 4 ? argv[4] : "", *file = argc > 5 ? argv[5] : "";
    int seconds = argc > 6 ? atoi(argv[6]) : PATIENCE * 2;
    double until = now() + 1e3 * seconds;
    int pause = strcmp(how, "cost") ? 0 : atoi(file);
    alarm(seconds + PATIENCE);
    count = mib * 4;
    blocks = mmap(NULL, count * sizeof *blocks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    is = mmap(NULL, count * sizeof *is, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (blocks == MAP_FAILED || is == MAP_FAILED) fail("mmap", count);
    for (int i = 0; i < count; i++) {
        blocks[i] = malloc(BLOCK);
        if (!blocks[i]) fail("malloc", i);
        memset(blocks[i], 0, BLOCK);
        if (i % 64 == 63) usleep(1000 * pause);
    }
    put(1, -1);
    pthread_t thread[16];
    for (long i = 0; i < threads; i++)
        if (pthread_create(&thread[i], NULL, allocate, (void *)(i + 1))) fail("pthread_create", i);
    say("ready\n");
    long number = 1;
    int begun = 0, forked = 0;
    if (!strcmp(how, "later")) await(file);
    if (!strcmp(how, "cost")) cost((size_t)mib << 20, forks);
    if (!strcmp(how, "touch")) touch(mib);
    if (!strcmp(how, "heirs")) heirs();
    if (!strcmp(how, "hold") || !strcmp(how, "split") || !strcmp(how, "bereft") || !strcmp(how, "rest") || !strcmp(how, "kept"))
        look_around(how, file);
    else if (strcmp(how, "cost") && strcmp(how, "touch") && strcmp(how, "heirs"))
        for (; forked < forks && now() < until; forked++) {
            pid_t pid = start();
            if (pid == 0) {
                if (!strcmp(how, "kill")) {
                    for (;;) check("a child to be killed", -1);
                }
                if (!strcmp(how, "orphan")) {
                    setsid();
                    usleep(300000);
                }
                child(number);
                if (!strcmp(how, "orphan")) make(file);
                _exit(0);
            }
            if (!strcmp(how, "orphan")) _exit(0);
            number++;
            /* The rest stays as it was at the fork, and may be its own again when the child is gone. */
            put(number, number % 3);
            if (!strcmp(how, "kill")) {
                usleep(forked * 300);
                kill(pid, SIGKILL);
                waitpid(pid, NULL, 0);
            } else {
                end("the child", pid);
            }
            check("the parent", -1);
            if (forked == 5) begun = descriptors();
        }
    /* Some are open for a moment. */
    int more = begun ? descriptors() - begun : 0;
    stop = 1;
    for (int i = 0; i < threads; i++) pthread_join(thread[i], NULL);
    if (!strcmp(how, "storm")) {
        if (more > 16) fail("descriptors more than after five forks", more);
        print("forked", forked);
        say("at rest\n");
        await(file);
    }
    say("intact\n");
    return 0;
}
