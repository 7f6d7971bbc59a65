/* Does to itself what programs do (the first argument), with 64 MiB on the heap; says "ready"; reads and writes all of
 * it for some seconds and says "intact" if it is what it was. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { BLOCKS = 512, BLOCK = 128 << 10, PAGE = 4096, WORDS = BLOCK / sizeof(long) };
static long *blocks[BLOCKS];

static void need(int holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static void say(const char *text) {
    if (write(1, text, strlen(text)) < 0) _exit(1);
}

/* Denies a system call; and for ioctl(2) the one request that makes a userfaultfd of its device. */
static void deny(long number) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number == SYS_userfaultfd ? 0xaa00 : 0xffffffff, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    need(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs");
    need(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0, "seccomp");
}

static long number_in(const char *path, const char *key) {
    char line[256];
    long value = -1;
    FILE *file = fopen(path, "r");
    need(file != NULL, path);
    while (value < 0 && fgets(line, sizeof line, file))
        if (!strncmp(line, key, strlen(key))) value = atol(line + strlen(key));
    fclose(file);
    return value;
}

static void limit_addresses(void) {
    long now = number_in("/proc/self/status", "VmSize:") << 10;
    struct rlimit limit = {(rlim_t)now + (24 << 20), (rlim_t)now + (24 << 20)};
    need(setrlimit(RLIMIT_AS, &limit) == 0, "RLIMIT_AS");
}

/* Leaves the process a few mappings. */
static void use_up_mappings(long left) {
    long most = number_in("/proc/sys/vm/max_map_count", ""), now = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    for (int c; (c = getc(maps)) != EOF;) now += c == '\n';
    fclose(maps);
    long pages = most - now - left;
    need(pages > 0, "mappings");
    char *at = mmap(NULL, pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    need(at != MAP_FAILED, "mmap");
    for (long i = 1; i < pages; i += 2) need(mprotect(at + i * PAGE, PAGE, PROT_READ) == 0, "mprotect");
}

static void misbehave(const char *how) {
    char *page = (char *)(((size_t)blocks[BLOCKS / 2] + 2 * PAGE) & -(size_t)PAGE);
    if (!strcmp(how, "close"))
        need(close_range(3, ~0u, 0) == 0, "close_range");
    else if (!strcmp(how, "mprotect"))
        need(mprotect(page, PAGE, PROT_READ) == 0, "mprotect");
    else if (!strcmp(how, "mlock"))
        need(mlock(page, PAGE) == 0, "mlock");
    else if (!strcmp(how, "addresses"))
        limit_addresses();
    else if (!strcmp(how, "mappings"))
        use_up_mappings(600);
    else if (!strcmp(how, "no mappings"))
        use_up_mappings(300);
}

int main(int argc, char **argv) {
    const char *how = argc > 1 ? argv[1] : "";
    /* The filter must be there before the library is: so once more, with it. */
    if (!strcmp(how, "userfaultfd") || !strcmp(how, "io_uring")) {
        deny(!strcmp(how, "userfaultfd") ? SYS_userfaultfd : SYS_io_uring_setup);
        execl("/proc/self/exe", argv[0], "filtered", NULL);
        need(0, "exec");
    }
    if (!strcmp(how, "mlockall")) need(mlockall(MCL_CURRENT | MCL_FUTURE) == 0, "mlockall");
    for (long i = 0; i < BLOCKS; i++) {
        need((blocks[i] = malloc(BLOCK)) != NULL, "malloc");
        for (long word = 0; word < WORDS; word++) blocks[i][word] = i * WORDS + word;
    }
    misbehave(how);
    say("ready\n");
    int read_only = !strcmp(how, "mprotect");
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        for (long i = 0; i < BLOCKS; i++)
            for (long word = 0; word < WORDS; word += 64) {
                if (blocks[i][word] != i * WORDS + word) return say("lost\n"), 1;
                if (!read_only) *(volatile long *)&blocks[i][word] = i * WORDS + word;
            }
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec - start.tv_sec < 4);
    say("intact\n");
    return 0;
}
