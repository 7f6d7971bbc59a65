/* Each entry point works as the very first call that a process makes into the heap: it is called from
 * the preinit array, before any constructor of this program, in a fresh process for each. */
#include "check.h"
#include <malloc.h>
#include <spawn.h>
#include <sys/wait.h>

extern char **environ;

static void *posix_memalign_first(void) {
    void *block = NULL;
    return posix_memalign(&block, 64, 100) == 0 ? block : NULL;
}

static const char *const NAMES[] = {
    "malloc", "calloc", "realloc", "reallocarray", "memalign", "aligned_alloc", "posix_memalign", "valloc", "pvalloc",
    "free", "malloc_usable_size", "malloc_trim", "mallopt", "mallinfo2", "malloc_large",
};
enum { COUNT = sizeof NAMES / sizeof NAMES[0] };

static void call_first(int which) {
    void *block = NULL;
    size_t size = 100;
    switch (which) {
    case 0: block = malloc(100); break;
    case 1: block = calloc(10, 10); break;
    case 2: block = realloc(NULL, 100); break;
    case 3: block = reallocarray(NULL, 10, 10); break;
    case 4: block = memalign(64, 100); break;
    case 5: block = aligned_alloc(64, 128); break;
    case 6: block = posix_memalign_first(); break;
    case 7: block = valloc(100); break;
    case 8: block = pvalloc(100); break;
    case 9: free(NULL); return;
    case 10: REQUIRE(malloc_usable_size(NULL) == 0, "malloc_usable_size(NULL) is not 0"); return;
    case 11: malloc_trim(0); return;
    case 12: mallopt(M_MMAP_THRESHOLD, 1 << 20); return;
    case 13: (void)mallinfo2(); return;
    case 14: size = 20 * MIB, block = malloc(size); break;
    }
    REQUIRE(block != NULL, "%s as first call returned NULL", NAMES[which]);
    pattern_fill(block, 3, 0, size);
    REQUIRE(pattern_verify(block, 3, 0, size) == size, "%s as first call: the block does not hold", NAMES[which]);
    free(block);
}

static void before_constructors(int argc, char **argv, char **environment) {
    (void)environment;
    for (int i = 0; argc == 3 && strcmp(argv[1], "--first") == 0 && i < COUNT; i++) {
        if (strcmp(argv[2], NAMES[i]) == 0) {
            call_first(i);
        }
    }
}

__attribute__((section(".preinit_array"), used)) static void (*const preinit)(int, char **, char **) = before_constructors;

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    if (argc == 3) {
        /* The rest of the process works after that first call. */
        for (int i = 0; i < COUNT; i++) {
            call_first(i);
        }
        return check_result();
    }
    for (int i = 0; i < COUNT; i++) {
        char *arguments[] = {argv[0], "--first", (char *)NAMES[i], NULL};
        pid_t child;
        int status = -1;
        REQUIRE(posix_spawn(&child, "/proc/self/exe", NULL, NULL, arguments, environ) == 0, "posix_spawn failed");
        REQUIRE(waitpid(child, &status, 0) == child, "waitpid failed");
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a process that calls %s first ended with status %#x",
              NAMES[i], status);
    }
    return check_result();
}
