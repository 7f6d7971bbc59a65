/* Memory that the C library allocates for the caller comes from the same heap: free takes it, realloc
 * grows it, malloc_usable_size knows it. */
#include "check.h"
#include <dirent.h>
#include <locale.h>
#include <malloc.h>
#include <netdb.h>
#include <regex.h>
#include <search.h>
#include <wchar.h>

static void expect_ours(const char *function, void *block, size_t least) {
    CHECK(block != NULL, "%s returned NULL", function);
    size_t usable = malloc_usable_size(block);
    CHECK(usable >= least && usable < least + 64 * KIB, "%s returned %zu usable bytes for %zu", function, usable, least);
    block = realloc(block, least + 100000);
    CHECK(block != NULL, "realloc of %s's result failed", function);
    free(block);
}

static int compare(const void *a, const void *b) {
    return *(const int *)a - *(const int *)b;
}

static void sorting_allocates(void) {
    enum { COUNT = 300000 };
    int *numbers = malloc(COUNT * sizeof *numbers);
    REQUIRE(numbers != NULL, "malloc returned NULL");
    uint64_t random = 11;
    for (int i = 0; i < COUNT; i++) {
        numbers[i] = (int)(next_random(&random) % 1000000);
    }
    qsort(numbers, COUNT, sizeof *numbers, compare);
    for (int i = 1; i < COUNT; i++) {
        CHECK(numbers[i - 1] <= numbers[i], "qsort left %d before %d", numbers[i - 1], numbers[i]);
    }
    free(numbers);
}

static void streams(void) {
    char *text = NULL;
    size_t length = 0;
    FILE *stream = open_memstream(&text, &length);
    REQUIRE(stream != NULL, "open_memstream failed");
    for (int i = 0; i < 20000; i++) {
        fprintf(stream, "line %d\n", i);
    }
    fclose(stream);
    stream = fmemopen(text, length, "r");
    char *line = NULL;
    size_t room = 0;
    int lines = 0;
    while (getline(&line, &room, stream) > 0) {
        lines++;
    }
    fclose(stream);
    CHECK(lines == 20000, "getline read %d lines of 20000", lines);
    expect_ours("getline", line, 8);
    expect_ours("open_memstream", text, length);
}

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    setlocale(LC_ALL, "");
    expect_ours("strdup", strdup("a string"), 9);
    expect_ours("strndup", strndup("a string", 3), 4);
    expect_ours("wcsdup", wcsdup(L"wide"), 5 * sizeof(wchar_t));
    char *formatted = NULL;
    CHECK(asprintf(&formatted, "%0*d", 3000, 7) == 3000, "asprintf failed");
    expect_ours("asprintf", formatted, 3001);
    char *scanned = NULL;
    CHECK(sscanf("word rest", "%ms", &scanned) == 1, "sscanf with m failed");
    expect_ours("sscanf", scanned, 5);
    expect_ours("realpath", realpath("/", NULL), 2);
    expect_ours("getcwd", getcwd(NULL, 0), 2);

    struct dirent **entries = NULL;
    int found = scandir("/", &entries, NULL, alphasort);
    CHECK(found > 2, "scandir found %d entries", found);
    for (int i = 0; i < found; i++) {
        free(entries[i]);
    }
    free(entries);

    regex_t pattern;
    CHECK(regcomp(&pattern, "^(a|b)*c{2,5}[[:digit:]]+$", REG_EXTENDED) == 0, "regcomp failed");
    CHECK(regexec(&pattern, "ababcc42", 0, NULL, 0) == 0, "regexec found nothing");
    regfree(&pattern);

    struct hsearch_data table = {0};
    CHECK(hcreate_r(1000, &table) != 0, "hcreate_r failed");
    hdestroy_r(&table);
    struct addrinfo *address = NULL;
    if (getaddrinfo("127.0.0.1", "80", NULL, &address) == 0) {
        freeaddrinfo(address);
    }
    sorting_allocates();
    streams();
    return check_result();
}
