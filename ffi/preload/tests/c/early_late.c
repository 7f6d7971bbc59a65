/* The heap works before main (constructors) and after it (atexit handlers, destructors), and what the
 * one allocates the other may free. */
#include "check.h"
#include <malloc.h>

static unsigned char *from_first, *from_second;
static atomic_int late_stages;

__attribute__((constructor(101))) static void first_constructor(void) {
    from_first = malloc(10000);
    REQUIRE(from_first != NULL, "malloc in a constructor returned NULL");
    pattern_fill(from_first, 1, 0, 10000);
    free(malloc(3 * MIB));
}

__attribute__((constructor)) static void second_constructor(void) {
    from_second = calloc(1, 500);
    REQUIRE(from_second != NULL, "calloc in a constructor returned NULL");
    REQUIRE(zero_verify(from_second, 500) == 500, "calloc in a constructor is not zero");
    from_first = realloc(from_first, 20000);
    REQUIRE(from_first != NULL, "realloc in a constructor returned NULL");
}

static void at_exit(void) {
    void *block = malloc(70 * KIB);
    REQUIRE(block != NULL, "malloc in an atexit handler returned NULL");
    memset(block, 1, 70 * KIB);
    free(block);
    REQUIRE(pattern_verify(from_first, 1, 0, 10000) == 10000, "a constructor's block changed before atexit");
    from_first = realloc(from_first, 100);
    REQUIRE(from_first != NULL, "realloc in an atexit handler returned NULL");
    late_stages++;
}

static void on_exit_handler(int status, void *argument) {
    (void)status;
    REQUIRE(malloc_usable_size(argument) >= 40, "on_exit's argument is no block any more");
    free(argument);
    late_stages++;
}

/* Runs last of the program's own, so it also sees that the others ran. */
__attribute__((destructor(101))) static void last_destructor(void) {
    REQUIRE(late_stages == 2, "only %d of 2 exit handlers ran", late_stages);
    REQUIRE(pattern_verify(from_first, 1, 0, 100) == 100, "a block changed before the last destructor");
    free(from_first);
    for (size_t size = 1; size < 4 * MIB; size *= 3) {
        void *block = calloc(1, size);
        REQUIRE(block != NULL && zero_verify(block, size) == size, "calloc(1, %zu) in a destructor", size);
        free(block);
    }
    free(memalign(4096, 5000));
}

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    CHECK(pattern_verify(from_first, 1, 0, 10000) == 10000, "a constructor's block changed before main");
    free(from_second);
    atexit(at_exit);
    on_exit(on_exit_handler, malloc(40));
    return check_result();
}
