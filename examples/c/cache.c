/* A cache that goes when capacity is asked back: an arena with a pressure callback. */
#include <dcmalloc.h>
#include <stdio.h>
#include <string.h>

enum { BLOCKS = 64, BLOCK = 1 << 20 };
static void *blocks[BLOCKS];

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
    /* All that the device has lent, as an operator's `dcm release` would. */
    if (dcm_release((uint64_t)1 << 30, 10000) != DCM_OK)
        fprintf(stderr, "%s\n", dcm_last_error());
    dcm_arena_destroy(arena);
    printf("%d of %d blocks dropped\n", dropped, BLOCKS);
    return dropped != BLOCKS;
}
