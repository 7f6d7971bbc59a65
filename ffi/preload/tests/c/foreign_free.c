/* Memory of other allocators that is freed here: a library loaded with RTLD_DEEPBIND has glibc's malloc, an
 * allocator inside the program has mappings, the break, or a static array. glibc aborts on what it does not
 * know. We leave it alone: it is not handed out, its owner still has it, and the program goes on. */
#include "check.h"
#include <dlfcn.h>
#include <malloc.h>
#include <sys/mman.h>

typedef void *(*make_fn)(size_t);
enum { SENTINEL = 4242, LENGTH = 3000, PLACES = 7, MANY = 20000 };

static unsigned char in_data[LENGTH + 64] __attribute__((aligned(4096)));
static unsigned char *places[PLACES];
static int count;

static void add(unsigned char *block) {
    memset(block, 0xA5, LENGTH);
    places[count++] = block;
}

static unsigned char *mapped_at(void *hint) {
    unsigned char *block = mmap(hint, 64 * KIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REQUIRE(block != MAP_FAILED, "mmap failed");
    return block;
}

/* What the library's own malloc gives: another allocator's, if the loader binds it so. */
static unsigned char *of_a_library(void) {
    static char path[4096];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 32);
    REQUIRE(length > 0, "readlink of /proc/self/exe failed");
    path[length] = 0;
    strcpy(strrchr(path, '/') + 1, "plugin_heap.so");
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
    REQUIRE(library != NULL, "dlopen: %s", dlerror());
    make_fn make = (make_fn)dlsym(library, "plugin_make");
    REQUIRE(make != NULL, "dlsym: %s", dlerror());
    unsigned char *block = make(LENGTH);
    REQUIRE(block != NULL, "the library has no memory");
    return block;
}

static void expect_left_alone(unsigned char *block) {
    errno = SENTINEL;
    free(block);
    CHECK(errno == SENTINEL, "free of %p changed errno to %d", (void *)block, errno);
    CHECK(realloc(block, 2 * LENGTH) == NULL, "realloc took %p for its own", (void *)block);
    CHECK(errno == EINVAL, "realloc of %p: errno is %d", (void *)block, errno);
    CHECK(malloc_usable_size(block) == 0, "%p has a usable size", (void *)block);
}

static void expect_not_handed_out(void) {
    static unsigned char *blocks[MANY];
    uint64_t random = 7;
    for (int i = 0; i < MANY; i++) {
        size_t size = i % 2 ? 8 : next_random(&random) % 3000 + 1;
        blocks[i] = malloc(size);
        REQUIRE(blocks[i] != NULL, "malloc(%zu) returned NULL", size);
        memset(blocks[i], i, size);
        for (int place = 0; place < count; place++) {
            CHECK(blocks[i] + size <= places[place] || blocks[i] >= places[place] + LENGTH,
                  "malloc(%zu) handed out %p of another allocator", size, (void *)blocks[i]);
        }
    }
    for (int i = 0; i < MANY; i++) {
        free(blocks[i]);
    }
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    if (on_glibc) {
        return check_skip("glibc ends a program that frees what is not its own");
    }
    unsigned char on_stack[LENGTH];
    add(on_stack);
    add(in_data + 64);
    add((unsigned char *)sbrk(64 * KIB) + 16);
    add(mapped_at(NULL) + 64);
    add(mapped_at((void *)(uintptr_t)(64 * MIB)));
    add(mapped_at((void *)(uintptr_t)0x123400000000) + 16);
    add(of_a_library());
    for (int i = 0; i < count; i++) {
        expect_left_alone(places[i]);
    }
    expect_not_handed_out();
    for (int i = 0; i < count; i++) {
        for (int at = 0; at < LENGTH; at++) {
            REQUIRE(places[i][at] == 0xA5, "byte %d of %p changed", at, (void *)places[i]);
        }
    }
    return check_result();
}
