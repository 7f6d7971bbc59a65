/* The environment grows, shrinks and is replaced; the C library keeps it in malloc'd memory, partly
 * made before the program's first line. */
#include "check.h"

extern char **environ;

int main(int argc, char **argv) {
    check_start(argc, argv, 60);
    char name[64], value[512];
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < 800; i++) {
            snprintf(name, sizeof name, "CONFORMANCE_%d", i);
            memset(value, 'a' + i % 26, sizeof value);
            value[(size_t)(i * 7 + round * 100) % (sizeof value - 1)] = 0;
            REQUIRE(setenv(name, value, 1) == 0, "setenv(%s) failed", name);
        }
        for (int i = 0; i < 800; i++) {
            snprintf(name, sizeof name, "CONFORMANCE_%d", i);
            const char *found = getenv(name);
            size_t length = (size_t)(i * 7 + round * 100) % (sizeof value - 1);
            CHECK(found != NULL && strlen(found) == length && (length == 0 || found[length - 1] == 'a' + i % 26),
                  "%s does not hold what was set", name);
            if (i % 3 == round) {
                unsetenv(name);
                CHECK(getenv(name) == NULL, "%s survived unsetenv", name);
            }
        }
    }
    char *ours = strdup("CONFORMANCE_PUT=1");
    putenv(ours);
    CHECK(getenv("CONFORMANCE_PUT") == ours + 16, "putenv copied its string");
    unsetenv("CONFORMANCE_PUT");
    free(ours);
    CHECK(getenv("PATH") == NULL || strlen(getenv("PATH")) > 0, "PATH was damaged");
    clearenv();
    CHECK(environ == NULL || environ[0] == NULL, "clearenv left something");
    CHECK(setenv("AGAIN", "yes", 1) == 0 && strcmp(getenv("AGAIN"), "yes") == 0, "setenv after clearenv");
    return check_result();
}
