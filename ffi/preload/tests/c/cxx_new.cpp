// new and delete in all their forms: alignment, the size handed to delete, nothrow, bad_alloc, the new
// handler, and containers and thread_local objects on top of them.
#define _GNU_SOURCE 1
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

static int failures;
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition) && failures++ < 20) {                                                     \
            dprintf(2, "%s:%d: ", __FILE__, __LINE__);                                             \
            dprintf(2, __VA_ARGS__);                                                               \
            dprintf(2, "\n");                                                                      \
        }                                                                                          \
    } while (0)

template <std::size_t Alignment> struct alignas(Alignment) Aligned {
    unsigned char bytes[Alignment * 3 / 2];
};

template <std::size_t Alignment> static void aligned_new() {
    for (int i = 0; i < 200; i++) {
        auto *one = new Aligned<Alignment>;
        auto *many = new Aligned<Alignment>[3];
        CHECK(reinterpret_cast<std::uintptr_t>(one) % Alignment == 0, "new of alignment %zu: %p", Alignment, (void *)one);
        CHECK(reinterpret_cast<std::uintptr_t>(many) % Alignment == 0, "new[] of alignment %zu: %p", Alignment, (void *)many);
        std::memset(static_cast<void *>(many), 1, 3 * sizeof *many);
        delete one;
        delete[] many;
        void *quiet = ::operator new(100, std::align_val_t(Alignment), std::nothrow);
        CHECK(quiet != nullptr && reinterpret_cast<std::uintptr_t>(quiet) % Alignment == 0, "nothrow aligned new: %p", quiet);
        ::operator delete(quiet, std::align_val_t(Alignment), std::nothrow);
        void *sized = ::operator new(100, std::align_val_t(Alignment));
        ::operator delete(sized, 100, std::align_val_t(Alignment));
    }
}

static void too_large() {
    volatile std::size_t sizes[] = {SIZE_MAX, SIZE_MAX - 4096, SIZE_MAX / 2 + 1, SIZE_MAX / 2, std::size_t(1) << 60};
    for (std::size_t size : sizes) {
        bool thrown = false;
        try {
            ::operator delete(::operator new(size));
        } catch (const std::bad_alloc &) {
            thrown = true;
        }
        CHECK(thrown, "new of %#zx bytes did not throw bad_alloc", size);
        // libstdc++ rounds the size up to the alignment first, and lets that wrap around.
        size = std::min(size, SIZE_MAX - 4096);
        thrown = false;
        try {
            ::operator delete(::operator new(size, std::align_val_t(256)), std::align_val_t(256));
        } catch (const std::bad_alloc &) {
            thrown = true;
        }
        CHECK(thrown, "aligned new of %#zx bytes did not throw bad_alloc", size);
        CHECK(::operator new(size, std::nothrow) == nullptr, "nothrow new of %#zx bytes is not null", size);
        CHECK(::operator new[](size, std::nothrow) == nullptr, "nothrow new[] of %#zx bytes is not null", size);
    }
}

static int handler_calls;
static void new_handler_is_called() {
    std::set_new_handler([] {
        if (++handler_calls == 3) {
            std::set_new_handler(nullptr);
        }
    });
    volatile std::size_t size = SIZE_MAX / 2;
    bool thrown = false;
    try {
        ::operator delete(::operator new(size));
    } catch (const std::bad_alloc &) {
        thrown = true;
    }
    CHECK(thrown && handler_calls == 3, "the new handler was called %d times instead of 3", handler_calls);
}

struct Local {
    std::vector<std::string> lines;
    ~Local() {
        std::string all;
        for (const auto &line : lines) {
            all += line;
        }
        CHECK(all.size() == lines.size() * 50, "a thread_local lost its content: %zu bytes", all.size());
    }
};
static thread_local Local local;

static void containers_in_threads() {
    std::vector<std::thread> threads;
    for (int i = 0; i < 40; i++) {
        threads.emplace_back([i] {
            std::map<int, std::unique_ptr<std::string>> map;
            for (int j = 0; j < 300; j++) {
                map[j * 7919 % 1000] = std::make_unique<std::string>(j, 'a' + i % 26);
                local.lines.emplace_back(50, 'x');
            }
            for (const auto &[key, value] : map) {
                CHECK(value->find_first_not_of(char('a' + i % 26)) == std::string::npos, "key %d changed", key);
            }
        });
    }
    for (auto &thread : threads) {
        thread.join();
    }
}

int main() {
    alarm(60);
    for (std::size_t size = 0; size < 300000; size = size * 5 / 4 + 1) {
        char *array = new char[size];
        std::fill(array, array + size, 'x');
        delete[] array;
        void *sized = ::operator new(size);
        ::operator delete(sized, size);
    }
    aligned_new<32>();
    aligned_new<64>();
    aligned_new<4096>();
    aligned_new<65536>();
    too_large();
    new_handler_is_called();
    containers_in_threads();
    local.lines.emplace_back(50, 'm');
    return failures == 0 ? 0 : 1;
}
