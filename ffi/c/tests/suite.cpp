// The C++ face: see behaviours.txt.
#include <dcmalloc.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "suite.h"

namespace {

constexpr std::size_t MIB = 1 << 20;

using bytes = std::vector<unsigned char, dcm::allocator<unsigned char>>;

template <typename F>
dcm_status refused(F f)
{
    try {
        f();
        return DCM_OK;
    } catch (const dcm::error &error) {
        return error.status();
    }
}

template <typename F>
bool out_of_memory(F f)
{
    try {
        f();
        return false;
    } catch (const std::bad_alloc &) {
        return true;
    }
}

std::uint64_t number_of(const dcm::arena &arena, const std::string &field)
{
    return dcm::number("arena." + std::to_string(arena.id()) + "." + field);
}

bool attached()
{
    if (!dcm::text("broker.socket").empty())
        return true;
    skipped_because = "no broker";
    return false;
}

void arena_is_made_and_ended()
{
    const auto before = dcm::number("arenas.count");
    {
        dcm::arena arena{dcm::params{}.name("index")};
        CHECK(dcm::number("arenas.count") == before + 1);
        CHECK(dcm::text("arena." + std::to_string(arena.id()) + ".name") == "index");
        std::vector<int, dcm::allocator<int>> numbers(100000, 7, arena);
        CHECK(dcm_arena_of(numbers.data()) == arena.id());
    }
    CHECK(dcm::number("arenas.count") == before);
}

void blocks_hold_what_is_written()
{
    dcm::arena arena;
    std::pmr::map<int, std::pmr::string> words(&arena);
    for (int i = 0; i < 200; i++)
        words[i] = std::pmr::string(static_cast<std::size_t>(i * i), static_cast<char>(i), &arena);
    for (const auto &[i, word] : words) {
        CHECK(word == std::pmr::string(static_cast<std::size_t>(i * i), static_cast<char>(i)));
        CHECK(word.capacity() < 32 || dcm_arena_of(word.data()) == arena.id());
    }
}

void blocks_are_aligned_and_zeroed()
{
    dcm::arena arena;
    for (std::size_t align = 1; align <= 4 * MIB; align *= 4) {
        void *block = arena.allocate(100, align);
        CHECK(reinterpret_cast<std::uintptr_t>(block) % align == 0);
        arena.deallocate(block, 100, align);
    }
    struct alignas(256) wide {
        char bytes[256];
    };
    std::vector<wide, dcm::allocator<wide>> wides(10, arena);
    CHECK(reinterpret_cast<std::uintptr_t>(wides.data()) % 256 == 0);
    bytes(4 * MIB, 7, arena).swap(*std::make_unique<bytes>(arena));
    bytes zero(4 * MIB, arena);
    CHECK(zero == bytes(4 * MIB, 0, arena));
}

void resizing_keeps_content()
{
    dcm::arena arena;
    bytes block(10, 3, arena);
    for (std::size_t size = 100; size < 8 * MIB; size *= 9)
        block.resize(size, 3);
    CHECK(block == bytes(block.size(), 3, arena));
    block.resize(50);
    block.shrink_to_fit();
    CHECK(block == bytes(50, 3, arena));
}

void other_threads_free()
{
    dcm::arena arena;
    std::vector<bytes> blocks;
    for (std::size_t i = 1; i < 2000; i++)
        blocks.emplace_back(i, static_cast<unsigned char>(i), arena);
    std::thread([&blocks] { blocks.clear(); }).join();
    CHECK(number_of(arena, "allocated") < 2 * MIB);
}

void limit_refuses_and_has_room_again()
{
    dcm::arena arena{dcm::params{}.limit(8 * MIB)};
    std::vector<bytes> blocks;
    CHECK(out_of_memory([&] {
        while (blocks.size() < 100)
            blocks.emplace_back(100000, static_cast<unsigned char>(1), arena);
    }));
    CHECK(blocks.size() >= 70);
    CHECK(number_of(arena, "pages") <= 8 * MIB && number_of(arena, "over_limit") > 0);
    blocks.clear();
    CHECK(bytes(7 * MIB, arena).size() == 7 * MIB);
}

void too_large_is_refused()
{
    dcm::arena arena;
    volatile std::size_t most = SIZE_MAX;
    CHECK(out_of_memory([&] { arena.deallocate(arena.allocate(most), most); }));
    CHECK(out_of_memory([&] { arena.deallocate(arena.allocate(most / 2), most / 2); }));
    CHECK(out_of_memory([&] { dcm::allocator<wchar_t>(arena).allocate(most / 2); }));
    CHECK(arena.try_allocate(std::size_t{1} << 40, 4096) == nullptr);
    bytes block(10, 1, arena);
    CHECK(out_of_memory([&] { block.reserve(block.max_size()); }));
    CHECK(block == bytes(10, 1, arena));
}

void foreign_memory_is_told_apart()
{
    dcm::arena arena, other;
    CHECK(!arena.is_equal(other) && arena.is_equal(arena));
    CHECK(dcm::allocator<int>(arena) != dcm::allocator<char>(other));
    const auto theirs = std::make_unique<char[]>(100);
    bytes ours(100, arena);
    CHECK(dcm_arena_of(ours.data()) == arena.id() && dcm_arena_of(theirs.get()) == DCM_NO_ARENA_ID);
    CHECK(refused([&] { dcm::check(dcm_free(theirs.get())); }) == DCM_FOREIGN);
}

void ended_arena_is_told_apart()
{
    dcm_arena id;
    {
        dcm::arena arena;
        id = arena.id();
    }
    CHECK(refused([&] { dcm::check(dcm_arena_destroy(id)); }) == DCM_NO_ARENA);
    CHECK(dcm_malloc(id, 10) == nullptr && dcm::arena{}.id() != id);
}

void arenas_that_cannot_be_are_refused()
{
    const auto before = dcm::number("arenas.count");
    auto make = [](dcm::params params) { return refused([&] { dcm::arena{std::move(params)}; }); };
    CHECK(make(dcm::params{}.name("a name of more than thirty-two bytes")) == DCM_INVALID);
    CHECK(make(dcm::params{}.placement("interleave=2")) == DCM_INVALID);
    std::vector<std::unique_ptr<dcm::arena>> all;
    CHECK(refused([&] {
              while (all.size() < 4096)
                  all.push_back(std::make_unique<dcm::arena>());
          }) == DCM_TOO_MANY);
    CHECK(before + all.size() == dcm::number("arenas.max"));
    all.clear();
    CHECK(dcm::number("arenas.count") == before);
}

void settings_that_are_none_are_named()
{
    try {
        dcm::check(dcm_configure("placment:dc"));
        CHECK(!"refused");
    } catch (const dcm::error &error) {
        CHECK(error.status() == DCM_INVALID);
        CHECK(std::strstr(error.what(), "did you mean `placement`?"));
    }
}

void statistics_count()
{
    const auto before = dcm::number("stats.allocated");
    dcm::arena arena;
    bytes block(10 * MIB, arena);
    CHECK(dcm::number("stats.allocated") >= before + 10 * MIB);
    CHECK(number_of(arena, "allocated") >= 10 * MIB && number_of(arena, "pages") >= 10 * MIB);
    CHECK(dcm::stats_json().front() == '{' && dcm::stats_json().back() == '}');
}

void blocks_lie_on_extents()
{
    if (!attached())
        return;
    dcm::arena arena, dram{dcm::params{}.placement("dram")};
    const auto before = dcm::number("stats.usage.extent_live");
    bytes in_dram(10 * MIB, dram);
    CHECK(dcm::number("stats.usage.extent_live") < before + 10 * MIB);
    bytes on_extents(10 * MIB, arena);
    CHECK(dcm::number("stats.usage.extent_live") >= before + 10 * MIB);
}

void tagged_arenas_lie_on_their_tag()
{
    CHECK(refused([] { dcm::arena{dcm::params{}.tag("seven")}; }) == DCM_INVALID);
    if (!attached())
        return;
    dcm::arena arena{dcm::params{}.tag(TAG).on_exhausted("fail")};
    dcm::arena unknown{dcm::params{}.tag(UNKNOWN_TAG).on_exhausted("fail")};
    dcm::arena untagged;
    const auto before = dcm::number("stats.usage.extent_live");
    bytes block(5 * MIB, 7, arena);
    CHECK(dcm::number("stats.usage.extent_live") >= before + 5 * MIB);
    CHECK(!arena.try_allocate(5 * MIB, 1) && !unknown.try_allocate(MIB, 1));
    CHECK(bytes(10 * MIB, 7, untagged).size() == 10 * MIB);
}

void shared_extents_are_read()
{
    CHECK(refused([] { dcm::shared_extents{"seven"}; }) == DCM_INVALID);
    if (!attached())
        return;
    dcm::shared_extents first(SHARED_TAG), second(SHARED_TAG);
    CHECK(first.size() == 4 * MIB && first.data() != second.data() && !first.is_lost());
    CHECK(std::equal(first.begin(), first.end(), second.begin(), second.end()));
    for (std::size_t i = 0; i < first.size(); i++)
        CHECK(std::to_integer<std::size_t>(first.begin()[i]) == i / MIB + 1);
    dcm::shared_extents moved(std::move(first));
    CHECK(moved.size() == 4 * MIB && first.size() == 0);
    CHECK(refused([] { dcm::shared_extents{UNKNOWN_TAG}; }) == DCM_NO_TAG);
    CHECK(refused([] { dcm::shared_extents{TAG}; }) == DCM_NO_TAG);
}

void pins_hold_and_end()
{
    dcm::arena arena;
    bytes block(3 * MIB, arena);
    {
        dcm::pin pin(block.data(), block.size());
        CHECK(dcm::number("stats.pinned") >= 3 * MIB);
    }
    CHECK(dcm::number("stats.pinned") == 0);
    int here = 0;
    CHECK(refused([&] { dcm::pin(&here, sizeof here); }) == DCM_FOREIGN);
    CHECK(refused([&] { dcm::pin(block.data(), 0); }) == DCM_INVALID);
}

void pressure_is_heard()
{
    if (!attached())
        return;
    std::atomic<std::uint64_t> heard{0};
    dcm::arena fails{dcm::params{}.priority(-1).on_pressure(
        [](const dcm::pressure &) { throw std::runtime_error("on purpose"); })};
    std::vector<bytes> cache;
    dcm::arena arena{dcm::params{}.name("cache").on_pressure([&](const dcm::pressure &pressure) {
        heard = pressure.bytes;
        std::string scratch(100000, 'x');
        cache.clear();
    })};
    for (int i = 0; i < 160; i++)
        cache.emplace_back(MIB, arena);
    const auto failures = dcm::number("stats.callback_panics");
    dcm::release(200 * MIB, std::chrono::seconds(20));
    CHECK(heard > 0 && cache.empty());
    CHECK(dcm::number("stats.callback_panics") == failures + 1);
}

void receipt_says_what_came_back()
{
    if (!attached())
        return;
    const auto receipt = dcm::release(8 * MIB, std::chrono::seconds(20));
    CHECK(receipt.find("\"asked\":8388608") != std::string::npos);
    CHECK(receipt.find("\"returned\":8388608") != std::string::npos);
}

void live_memory_keeps_its_content()
{
    if (!attached())
        return;
    dcm::arena arena;
    std::vector<std::uint32_t, dcm::allocator<std::uint32_t>> numbers(4 * MIB, arena);
    for (std::size_t i = 0; i < numbers.size(); i++)
        numbers[i] = static_cast<std::uint32_t>(i * 7);
    dcm::release(256 * MIB, std::chrono::seconds(20));
    for (std::size_t i = 0; i < numbers.size(); i++)
        CHECK(numbers[i] == static_cast<std::uint32_t>(i * 7));
}

} // namespace

#define BEHAVIOUR(name) {#name, name}

int main()
{
    static const behaviour behaviours[] = {
        BEHAVIOUR(arena_is_made_and_ended),
        BEHAVIOUR(blocks_hold_what_is_written),
        BEHAVIOUR(blocks_are_aligned_and_zeroed),
        BEHAVIOUR(resizing_keeps_content),
        BEHAVIOUR(other_threads_free),
        BEHAVIOUR(limit_refuses_and_has_room_again),
        BEHAVIOUR(too_large_is_refused),
        BEHAVIOUR(foreign_memory_is_told_apart),
        BEHAVIOUR(ended_arena_is_told_apart),
        BEHAVIOUR(arenas_that_cannot_be_are_refused),
        BEHAVIOUR(settings_that_are_none_are_named),
        BEHAVIOUR(statistics_count),
        BEHAVIOUR(blocks_lie_on_extents),
        BEHAVIOUR(tagged_arenas_lie_on_their_tag),
        BEHAVIOUR(shared_extents_are_read),
        BEHAVIOUR(pins_hold_and_end),
        BEHAVIOUR(pressure_is_heard),
        BEHAVIOUR(receipt_says_what_came_back),
        BEHAVIOUR(live_memory_keeps_its_content),
    };
    return run_all(behaviours, sizeof behaviours / sizeof *behaviours);
}
