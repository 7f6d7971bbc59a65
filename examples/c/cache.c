/* A cache that goes when capacity is asked back: an arena with a pressure callback. */
#include <dcmalloc.h>
#include <stdio.h>
#include <string.h>

enum { BLOCKS = 64, BLOCK = 1 << 20 };
static void *blocks[BLOCKS];

/* How much the arena has, drawn: half a character for each block. */
static void draw(const char *when, dcm_arena arena)
{
    char name[64];
    uint64_t pages = 0;
    size_t size = sizeof pages;
    snprintf(name, sizeof name, "arena.%llu.pages", (unsigned long long)arena);
    dcm_ctl(name, &pages, &size, NULL, 0);
    int filled = (int)(pages / BLOCK * 32 / BLOCKS);
    filled = filled > 32 ? 32 : filled;
    printf("%-8s |%.*s%*s| %2d MiB in the arena\n", when, filled, "################################",
           32 - filled, "", (int)(pages >> 20));
}

static int drop(void *dropped, const struct dcm_pressure *pressure)
{
    printf("%llu bytes are wanted back\n", (unsigned long long)pressure->bytes);
    for (int i = 0; i < BLOCKS; i++)
        *(int *)dropped += dcm_free(blocks[i]) == DCM_OK;
    return 0;
}

int main(void)
{
    int dropped = 0;
    struct dcm_arena_params params = {
        .struct_size = sizeof params, .name = "cache", .on_pressure = drop, .context = &dropped};
    dcm_arena arena;
    if (dcm_attach(NULL) != DCM_OK || dcm_arena_create(&params, &arena) != DCM_OK) {
        fprintf(stderr, "%s\n", dcm_last_error());
        return 1;
    }
    for (int i = 0; i < BLOCKS; i++)
        if ((blocks[i] = dcm_malloc(arena, BLOCK)))
            memset(blocks[i], i, BLOCK);
    draw("before", arena);
    /* All that the device has lent, as an operator's `dcm release` would. */
    if (dcm_release((uint64_t)1 << 30, 10000) != DCM_OK)
        fprintf(stderr, "%s\n", dcm_last_error());
    draw("after", arena);
    dcm_arena_destroy(arena);
    printf("%d of %d blocks dropped\n", dropped, BLOCKS);
    return dropped != BLOCKS;
}
