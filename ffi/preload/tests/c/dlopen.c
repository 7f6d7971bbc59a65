/* Libraries come and go while threads allocate; blocks pass between a library and the program and
 * outlive the library that made them. */
#include "check.h"
#include <dlfcn.h>
#include <pthread.h>

typedef void *(*make_fn)(size_t);
typedef void (*free_fn)(void *);

static char plugin_path[4096];
static atomic_bool stop;

static void *allocating(void *argument) {
    uint64_t random = (uint64_t)(size_t)argument + 99;
    while (!atomic_load(&stop)) {
        size_t size = next_random(&random) % (20 * KIB) + 1;
        unsigned char *block = malloc(size);
        REQUIRE(block != NULL, "malloc(%zu) returned NULL", size);
        block[0] = block[size - 1] = 1;
        free(block);
    }
    return NULL;
}

static void *using_plugin(void *argument) {
    size_t thread = (size_t)argument;
    for (size_t round = 0; round < 60; round++) {
        void *plugin = dlopen(plugin_path, round % 2 ? RTLD_NOW : RTLD_LAZY | RTLD_LOCAL);
        REQUIRE(plugin != NULL, "dlopen: %s", dlerror());
        make_fn make = (make_fn)dlsym(plugin, "plugin_make");
        free_fn plugin_free = (free_fn)dlsym(plugin, "plugin_free");
        REQUIRE(make != NULL && plugin_free != NULL, "dlsym: %s", dlerror());
        size_t size = 100 + thread * 1000 + round * 50;
        unsigned char *kept = make(size), *handed = malloc(size);
        REQUIRE(kept != NULL && handed != NULL, "the library could not allocate %zu bytes", size);
        plugin_free(handed);
        dlclose(plugin);
        CHECK(kept[0] == 1 && kept[size - 1] == 1, "a block changed when the library that made it was unloaded");
        free(kept);
        /* A failing lookup allocates its message, too. */
        CHECK(dlopen("no-such-library.so", RTLD_NOW) == NULL, "dlopen found what is not there");
        CHECK(dlerror() != NULL, "dlerror has no message");
    }
    return NULL;
}

int main(int argc, char **argv) {
    check_start(argc, argv, 120);
    ssize_t length = readlink("/proc/self/exe", plugin_path, sizeof plugin_path - 32);
    REQUIRE(length > 0, "readlink of /proc/self/exe failed");
    plugin_path[length] = 0;
    strcpy(strrchr(plugin_path, '/') + 1, "plugin_heap.so");

    pthread_t allocators[2], users[4];
    for (size_t i = 0; i < 2; i++) {
        REQUIRE(pthread_create(&allocators[i], NULL, allocating, (void *)i) == 0, "pthread_create failed");
    }
    for (size_t i = 0; i < 4; i++) {
        REQUIRE(pthread_create(&users[i], NULL, using_plugin, (void *)i) == 0, "pthread_create failed");
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(users[i], NULL);
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2; i++) {
        pthread_join(allocators[i], NULL);
    }
    return check_result();
}
