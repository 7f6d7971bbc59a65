/* A daemon as of daemon(7): it forks twice, closes every descriptor, and its parents exit; it works on with what
 * it had on its heap, and has more. The first argument is the file to write the result to. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* What it has when it forks, and in the end. */
enum { EARLY = 4000, BLOCKS = 30000, STEP = 2000, SIZE = 3000 };
static uint32_t *blocks[BLOCKS];

static void fill(int i, uint32_t seed) {
    for (size_t word = 0; word < SIZE / 4; word++) {
        blocks[i][word] = seed * 2654435761u + (uint32_t)word;
    }
}

static int is_whole(int i, uint32_t seed) {
    for (size_t word = 0; word < SIZE / 4; word++) {
        if (blocks[i][word] != seed * 2654435761u + (uint32_t)word) {
            return 0;
        }
    }
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 3) {
        return 2;
    }
    for (int i = 0; i < EARLY; i++) {
        if ((blocks[i] = malloc(SIZE)) == NULL) {
            return 3;
        }
        fill(i, (uint32_t)i);
    }
    for (int generation = 0; generation < 2; generation++) {
        int ready[2];
        if (pipe(ready) != 0) {
            return 5;
        }
        pid_t child = fork();
        if (child < 0) {
            return 4;
        }
        if (child > 0) {
            /* Who started us may end what is left of our group when we exit: not before the child has left it. */
            char none;
            close(ready[1]);
            _exit(read(ready[0], &none, 1) != 0);
        }
        setsid();
        close(ready[0]);
        close(ready[1]);
    }
    umask(022);
    for (int fd = 0; fd < 1024; fd++) {
        close(fd);
    }
    const char *said = "whole";
    time_t end = time(NULL) + atoi(argv[2]);
    uint32_t round = 0;
    int count = EARLY;
    do {
        for (int i = 0; i < STEP && count < BLOCKS; i++, count++) {
            if ((blocks[count] = malloc(SIZE)) == NULL) {
                said = "malloc failed";
                break;
            }
            fill(count, (uint32_t)count + (count % 3 == 0 ? round : 0));
        }
        for (int i = 0; i < count && said[0] == 'w'; i++) {
            uint32_t seed = (uint32_t)i + (i % 3 == 0 ? round : 0);
            if (!is_whole(i, seed)) {
                said = "a block has changed";
            }
            if (i % 3 == 0) {
                free(blocks[i]);
                if ((blocks[i] = malloc(SIZE)) == NULL) {
                    said = "malloc failed";
                    break;
                }
                fill(i, seed + 1);
            }
        }
        round++;
        usleep(20000);
    } while (said[0] == 'w' && (count < BLOCKS || time(NULL) < end));
    /* The first free descriptor, as the manual has it. */
    int fd = open(argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd != 0) {
        said = "descriptors are left over";
    }
    dprintf(fd, "%s\n", said);
    return fd < 0;
}
