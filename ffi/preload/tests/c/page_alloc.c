/* valloc gives page alignment; pvalloc gives it too and rounds the size up to whole pages. */
#include "check.h"
#include <malloc.h>

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (size_t size = 0; size <= 40 * page; size += size < 64 ? 1 : 1021) {
        void *block = valloc(size);
        CHECK(block != NULL && is_aligned(block, page), "valloc(%zu) returned %p", size, block);
        CHECK(malloc_usable_size(block) >= size, "valloc(%zu) holds %zu bytes", size, malloc_usable_size(block));
        if (block != NULL) {
            memset(block, 1, size);
        }

        /* What pvalloc(0) is differs between systems; glibc gives a block. */
        size_t rounded = (size + page - 1) / page * page;
        void *pages = pvalloc(size);
        CHECK(pages != NULL && is_aligned(pages, page), "pvalloc(%zu) returned %p", size, pages);
        CHECK(malloc_usable_size(pages) >= rounded, "pvalloc(%zu) holds %zu bytes, less than the %zu of its pages",
              size, malloc_usable_size(pages), rounded);
        if (pages != NULL) {
            memset(pages, 2, rounded);
        }
        CHECK(size == 0 || block == NULL || *(unsigned char *)block == 1, "pvalloc(%zu) overlaps a valloc block", size);
        free(block);
        free(pages);
    }
    return check_result();
}
