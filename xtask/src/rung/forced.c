/* Fills its heap and looks at it until some of it has changed: "zeroes N of M" if nothing else has. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { BLOCKS = 64, SIZE = 1 << 20, VALUE = 7, TRIES = 3000 };

static unsigned char *blocks[BLOCKS];

static void say(const char *text) {
    if (write(1, text, strlen(text)) < 0)
        _exit(3);
}

int main(void) {
    char line[64];
    for (int i = 0; i < BLOCKS; i++) {
        blocks[i] = malloc(SIZE);
        if (!blocks[i])
            return 2;
        memset(blocks[i], VALUE, SIZE);
    }
    say("ready\n");
    for (int try = 0; try < TRIES; try++) {
        long zeroes = 0, others = 0;
        usleep(10000);
        for (int i = 0; i < BLOCKS; i++)
            for (long at = 0; at < SIZE; at += 64) {
                zeroes += blocks[i][at] == 0;
                others += blocks[i][at] != 0 && blocks[i][at] != VALUE;
            }
        if (others)
            return 1;
        if (zeroes) {
            /* The heap is one as any other from now on. */
            for (int i = 0; i < BLOCKS; i++) {
                blocks[i] = realloc(blocks[i], 2 * SIZE);
                if (!blocks[i])
                    return 2;
                memset(blocks[i], VALUE, 2 * SIZE);
            }
            snprintf(line, sizeof line, "zeroes %ld of %ld\n", zeroes, (long)BLOCKS * SIZE / 64);
            say(line);
            return 0;
        }
    }
    return 4;
}
