/* fork of a program without threads, whose child makes some: they can open, flush and close streams. fork itself
 * frees glibc's list of streams in the child of a program with threads only, so a library that takes it
 * before a fork must free it as well. */
#include "check.h"
#include <pthread.h>
#include <sys/wait.h>

enum { DEADLINE = 20 };

static void *using_streams(void *argument) {
    FILE *file = fopen("/dev/null", "w");
    REQUIRE(file != NULL, "fopen(/dev/null) failed");
    CHECK(fprintf(file, "%d", 42) == 2, "fprintf");
    CHECK(fflush(NULL) == 0, "fflush(NULL)");
    CHECK(fclose(file) == 0, "fclose");
    return argument;
}

/* What a daemon does once it is one. */
static int child(void) {
    alarm(DEADLINE);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        REQUIRE(pthread_create(&threads[i], NULL, using_streams, NULL) == 0, "pthread_create failed");
    }
    using_streams(NULL);
    for (int i = 0; i < 2; i++) {
        REQUIRE(pthread_join(threads[i], NULL) == 0, "pthread_join failed");
    }
    return check_result();
}

int main(int argc, char **argv) {
    check_start(argc, argv, 2 * DEADLINE);
    void *volatile block = malloc(MIB);
    REQUIRE(block != NULL, "malloc(1 MiB) returned NULL");
    for (int generation = 0; generation < 2; generation++) {
        pid_t pid = fork();
        REQUIRE(pid >= 0, "fork failed");
        if (pid > 0) {
            int status;
            REQUIRE(waitpid(pid, &status, 0) == pid, "waitpid failed");
            CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child of generation %d ended with status %#x", generation,
                  status);
            break;
        }
        /* The last child has a parent that had no threads either. */
        if (generation == 1) {
            _exit(child());
        }
    }
    free(block);
    return check_result();
}
