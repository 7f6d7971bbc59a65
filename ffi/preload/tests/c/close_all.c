/* A daemon closes every descriptor it did not open, and lives: the heap goes on growing, and the
 * numbers that are free again belong to the program, not to descriptors the library remembers. */
#include "check.h"
#include <fcntl.h>
#include <sys/syscall.h>

enum { COUNT = 800, FILES = 24 };
#define TOTAL (200 * MIB)

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    unsigned char *before = malloc(10 * MIB);
    REQUIRE(before != NULL, "malloc(10 MiB) returned NULL");
    pattern_fill(before, 5, 0, 10 * MIB);

    REQUIRE(syscall(SYS_close_range, 3u, ~0u, 0u) == 0, "close_range(3, ~0) failed");

    /* The freed numbers, now with something in them that a stray write would spoil. */
    int files[FILES];
    for (int i = 0; i < FILES; i++) {
        files[i] = open("/tmp", O_TMPFILE | O_RDWR, 0600);
        REQUIRE(files[i] >= 0, "open of a temporary file failed");
        REQUIRE(write(files[i], &i, sizeof i) == sizeof i, "write failed");
    }

    static unsigned char *blocks[COUNT];
    static size_t sizes[COUNT];
    uint64_t random = 42;
    size_t total = 0;
    int count = 0;
    while (total < TOTAL) {
        REQUIRE(count < COUNT, "too many blocks");
        sizes[count] = count % 8 == 0 ? next_random(&random) % (3 * MIB) + 1 : next_random(&random) % (128 * KIB) + 1;
        blocks[count] = malloc(sizes[count]);
        REQUIRE(blocks[count] != NULL, "malloc(%zu) returned NULL after %zu bytes", sizes[count], total);
        pattern_fill(blocks[count], (size_t)count, 0, sizes[count]);
        total += sizes[count++];
        if (total > TOTAL / 2 && count + 100 > COUNT) {
            sizes[count] = TOTAL - total + 1;
            blocks[count] = malloc(sizes[count]);
            REQUIRE(blocks[count] != NULL, "malloc(%zu) returned NULL", sizes[count]);
            pattern_fill(blocks[count], (size_t)count, 0, sizes[count]);
            total += sizes[count++];
        }
    }
    for (int i = 0; i < count; i++) {
        CHECK(pattern_verify(blocks[i], (size_t)i, 0, sizes[i]) == sizes[i], "block %d lost its content", i);
        free(blocks[i]);
    }
    CHECK(pattern_verify(before, 5, 0, 10 * MIB) == 10 * MIB, "the block from before lost its content");
    free(before);

    /* Time for a helper thread to give memory back, and to make its mistakes. */
    usleep(300 * 1000);
    for (int i = 0; i < FILES; i++) {
        int content[2] = {-1, -1};
        CHECK(pread(files[i], content, sizeof content, 0) == sizeof(int) && content[0] == i,
              "descriptor %d is not the program's file any more", files[i]);
        CHECK(close(files[i]) == 0, "somebody closed descriptor %d", files[i]);
    }
    return check_result();
}
