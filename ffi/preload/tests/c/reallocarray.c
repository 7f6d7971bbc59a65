/* reallocarray: realloc for arrays, refusing products that overflow and leaving the old block alone. */
#include "check.h"
#include <malloc.h>

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    unsigned char *block = reallocarray(NULL, 10, 20);
    REQUIRE(block != NULL, "reallocarray(NULL, 10, 20) returned NULL");
    CHECK(malloc_usable_size(block) >= 200, "reallocarray(NULL, 10, 20) holds %zu bytes", malloc_usable_size(block));
    pattern_fill(block, 1, 0, 200);
    block = reallocarray(block, 1000, 30);
    REQUIRE(block != NULL, "reallocarray(p, 1000, 30) returned NULL");
    CHECK(malloc_usable_size(block) >= 30000, "reallocarray(p, 1000, 30) holds %zu bytes", malloc_usable_size(block));
    CHECK(pattern_verify(block, 1, 0, 200) == 200, "growing by reallocarray lost bytes");
    pattern_fill(block, 1, 200, 30000);
    block = reallocarray(block, 3, 50);
    REQUIRE(block != NULL, "reallocarray(p, 3, 50) returned NULL");
    CHECK(pattern_verify(block, 1, 0, 150) == 150, "shrinking by reallocarray lost bytes");

    static const volatile struct {
        size_t count, size;
    } OVERFLOWS[] = {{SIZE_MAX, 2},          {2, SIZE_MAX},        {SIZE_MAX / 2 + 1, 2},
                     {(size_t)1 << 32, (size_t)1 << 32}, {SIZE_MAX / 7, 9},    {SIZE_MAX, SIZE_MAX}};
    for (size_t i = 0; i < sizeof OVERFLOWS / sizeof OVERFLOWS[0]; i++) {
        errno = 0;
        void *result = reallocarray(block, OVERFLOWS[i].count, OVERFLOWS[i].size);
        CHECK(result == NULL && errno == ENOMEM, "reallocarray(p, %#zx, %#zx) returned %p with errno %d",
              OVERFLOWS[i].count, OVERFLOWS[i].size, result, errno);
        if (result != NULL) {
            return check_result();
        }
        CHECK(pattern_verify(block, 1, 0, 150) == 150, "a refused reallocarray changed the block");
    }
    CHECK(reallocarray(block, 0, 10) == NULL, "reallocarray(p, 0, 10) is not realloc(p, 0)");
    return check_result();
}
