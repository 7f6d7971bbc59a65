/* mallinfo2, malloc_info, malloc_stats, malloc_trim and mallopt answer for the heap that the program
 * uses, not for one that lies beside it. */
#include "check.h"
#include <fcntl.h>
#include <malloc.h>

enum { COUNT = 100000, SIZE = 100 };
static void *blocks[COUNT];

/* glibc books blocks it mapped one by one under hblkhd. */
static size_t in_use(void) {
    struct mallinfo2 info = mallinfo2();
    return info.uordblks + info.hblkhd;
}

static void mallinfo2_follows(void) {
    size_t before = in_use();
    for (int i = 0; i < COUNT; i++) {
        blocks[i] = malloc(SIZE);
        REQUIRE(blocks[i] != NULL, "malloc(%d) returned NULL", SIZE);
        *(char *)blocks[i] = 1;
    }
    size_t full = in_use();
    CHECK(full >= before + (size_t)COUNT * SIZE * 99 / 100, "%d blocks of %d bytes raised mallinfo2's bytes in use by %zd", COUNT,
          SIZE, (ssize_t)(full - before));
    CHECK(full <= before + (size_t)COUNT * SIZE * 2, "%d blocks of %d bytes raised mallinfo2's bytes in use by %zd", COUNT,
          SIZE, (ssize_t)(full - before));
    CHECK(mallinfo2().arena + mallinfo2().hblkhd >= (size_t)COUNT * SIZE, "mallinfo2 knows of only %zu bytes of heap",
          mallinfo2().arena + mallinfo2().hblkhd);
    for (int i = 0; i < COUNT; i++) {
        free(blocks[i]);
    }
    size_t after = in_use();
    CHECK(after < before + (size_t)COUNT * SIZE / 10, "after the frees mallinfo2 still has %zd bytes in use",
          (ssize_t)(after - before));

    before = in_use();
    void *large = malloc(64 * MIB);
    REQUIRE(large != NULL, "malloc(64 MiB) returned NULL");
    full = in_use();
    /* Less what other threads, or a cache that was flushed, may have freed meanwhile. */
    CHECK(full >= before + 63 * MIB, "64 MiB raised mallinfo2's bytes in use by %zd", (ssize_t)(full - before));
    free(large);
    CHECK(in_use() < before + 8 * MIB, "after the free of 64 MiB mallinfo2 still has %zd in use", (ssize_t)(in_use() - before));
}

static void malloc_info_is_xml(void) {
    char *text = NULL;
    size_t length = 0;
    FILE *stream = open_memstream(&text, &length);
    REQUIRE(stream != NULL, "open_memstream failed");
    CHECK(malloc_info(0, stream) == 0, "malloc_info(0) failed");
    fclose(stream);
    CHECK(length > 20 && strncmp(text, "<malloc", 7) == 0 && strstr(text, "</malloc>") != NULL,
          "malloc_info wrote no <malloc> document but: %.60s", text);
    free(text);
    CHECK(malloc_info(1, stderr) != 0, "malloc_info accepts options that do not exist");
}

static void malloc_stats_speaks(void) {
    int saved = dup(STDERR_FILENO);
    int file = open("/tmp", O_TMPFILE | O_RDWR, 0600);
    REQUIRE(saved >= 0 && file >= 0, "cannot redirect stderr");
    dup2(file, STDERR_FILENO);
    malloc_stats();
    dup2(saved, STDERR_FILENO);
    CHECK(lseek(file, 0, SEEK_END) > 0, "malloc_stats wrote nothing to stderr");
    close(file);
    close(saved);
}

static void trim_gives_back(void) {
    for (int i = 0; i < COUNT; i++) {
        blocks[i] = malloc(1000);
        REQUIRE(blocks[i] != NULL, "malloc(1000) returned NULL");
        memset(blocks[i], 1, 1000);
    }
    long full = status_kib("VmRSS:");
    for (int i = 0; i < COUNT; i++) {
        free(blocks[i]);
    }
    int trimmed = malloc_trim(0);
    CHECK(trimmed == 0 || trimmed == 1, "malloc_trim(0) returned %d", trimmed);
    long after = status_kib("VmRSS:");
    CHECK(after < full - 48 * 1024, "free and malloc_trim(0) of 95 MiB took the process from %ld to %ld KiB", full, after);
}

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    mallinfo2_follows();
    malloc_info_is_xml();
    malloc_stats_speaks();
    trim_gives_back();
    CHECK(mallopt(M_MMAP_THRESHOLD, 1 << 20) == 1, "mallopt(M_MMAP_THRESHOLD) was refused");
    CHECK(mallopt(M_TRIM_THRESHOLD, 1 << 20) == 1, "mallopt(M_TRIM_THRESHOLD) was refused");
    CHECK(mallopt(M_ARENA_MAX, 2) == 1, "mallopt(M_ARENA_MAX) was refused");
    void *block = malloc(5000);
    CHECK(block != NULL, "malloc fails after mallopt");
    free(block);
    return check_result();
}
