/* Loaded and unloaded by dlopen.c: allocates in its constructor, frees in its destructor, and brings a
 * dynamic-TLS block of its own, which the C library allocates on first touch in each thread. */
#include <stdlib.h>
#include <string.h>

static char *greeting;
static _Thread_local char scratch[6000];

__attribute__((constructor)) static void loaded(void) {
    greeting = malloc(3000);
    if (greeting != NULL) {
        memset(greeting, 'p', 3000);
    }
}

__attribute__((destructor)) static void unloaded(void) {
    free(greeting);
}

void *plugin_make(size_t size) {
    scratch[size % sizeof scratch] = 1;
    char *block = greeting != NULL && greeting[2999] == 'p' ? malloc(size) : NULL;
    if (block != NULL) {
        memset(block, scratch[size % sizeof scratch], size);
    }
    return block;
}

void plugin_free(void *block) {
    free(block);
}
