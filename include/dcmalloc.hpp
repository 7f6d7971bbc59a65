/*
 * dcmalloc for C++17: arenas that own themselves, as a std::pmr::memory_resource and as an allocator
 * for containers.
 *
 *     dcm::arena index{dcm::params{}.name("index").limit(64 << 20)};
 *     std::vector<int, dcm::allocator<int>> numbers{index};
 *     std::pmr::map<int, std::pmr::string> names{&index};
 */
#ifndef DCMALLOC_HPP
#define DCMALLOC_HPP

#include <dcmalloc.h>

#include <chrono>
#include <cstddef>
#include <functional>
#include <limits>
#include <memory>
#include <memory_resource>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace dcm {

/* A call that was refused; what() says why. */
class error : public std::runtime_error {
public:
    explicit error(dcm_status status) : std::runtime_error(dcm_last_error()), status_(status) {}

    dcm_status status() const noexcept { return status_; }

private:
    dcm_status status_;
};

inline void check(dcm_status status)
{
    if (status != DCM_OK)
        throw error(status);
}

/* Extents are recalled, and what is unused is not enough. */
struct pressure {
    /* Bytes that are still missing. */
    std::uint64_t bytes;
    /* For how long dropping is of use; what is live then is moved. */
    std::chrono::milliseconds within;
};

/* What an arena is to be; see dcm_arena_params. */
class params {
public:
    params &name(std::string name) { return name_ = std::move(name), *this; }
    params &placement(std::string placement) { return placement_ = std::move(placement), *this; }
    params &on_exhausted(std::string policy) { return on_exhausted_ = std::move(policy), *this; }
    /* Its extents are those with this tag, a UUID, and no others. */
    params &tag(std::string tag) { return tag_ = std::move(tag), *this; }
    params &limit(std::uint64_t bytes) { return limit_ = bytes, *this; }
    params &priority(std::int32_t priority) { return priority_ = priority, *this; }

    /* Called under pressure, on a thread of the library's. What it throws is caught and counted. */
    params &on_pressure(std::function<void(const pressure &)> callback)
    {
        return on_pressure_ = std::move(callback), *this;
    }

    /* Called with the bytes that read as zeroes now, because a device took them by force. */
    params &on_lost(std::function<void(std::uint64_t)> callback)
    {
        return on_lost_ = std::move(callback), *this;
    }

private:
    friend class arena;
    std::string name_, placement_, on_exhausted_, tag_;
    std::uint64_t limit_ = 0;
    std::int32_t priority_ = 0;
    std::function<void(const pressure &)> on_pressure_;
    std::function<void(std::uint64_t)> on_lost_;
};

/* An arena. Its memory goes, all of it at once, when this is destroyed: containers of it go first. */
class arena final : public std::pmr::memory_resource {
public:
    explicit arena(params params = {}) : params_(std::make_unique<class params>(std::move(params)))
    {
        auto text = [](const std::string &text) { return text.empty() ? nullptr : text.c_str(); };
        dcm_arena_params wanted = {};
        wanted.struct_size = sizeof wanted;
        wanted.name = text(params_->name_);
        wanted.placement = text(params_->placement_);
        wanted.on_exhausted = text(params_->on_exhausted_);
        wanted.tag = text(params_->tag_);
        wanted.limit = params_->limit_;
        wanted.priority = params_->priority_;
        if (params_->on_pressure_)
            wanted.on_pressure = pressed;
        if (params_->on_lost_)
            wanted.on_lost = lost;
        wanted.context = params_.get();
        check(dcm_arena_create(&wanted, &id_));
    }

    arena(const arena &) = delete;
    arena &operator=(const arena &) = delete;

    ~arena() override { dcm_arena_destroy(id_); }

    dcm_arena id() const noexcept { return id_; }

    /* Null where there is no memory within the limit. */
    void *try_allocate(std::size_t bytes, std::size_t align) noexcept
    {
        return align <= alignof(std::max_align_t) && bytes >= align
                   ? dcm_malloc(id_, bytes)
                   : dcm_aligned_alloc(id_, align, bytes);
    }

private:
    static int pressed(void *context, const dcm_pressure *asked) noexcept
    {
        try {
            static_cast<class params *>(context)->on_pressure_(
                pressure{asked->bytes, std::chrono::milliseconds(asked->within_ms)});
            return 0;
        } catch (...) {
            return -1;
        }
    }

    static int lost(void *context, const dcm_lost *lost) noexcept
    {
        try {
            static_cast<class params *>(context)->on_lost_(lost->bytes);
            return 0;
        } catch (...) {
            return -1;
        }
    }

    void *do_allocate(std::size_t bytes, std::size_t align) override
    {
        void *block = try_allocate(bytes, align);
        return block ? block : throw std::bad_alloc();
    }

    void do_deallocate(void *block, std::size_t, std::size_t) override { dcm_free(block); }

    bool do_is_equal(const std::pmr::memory_resource &other) const noexcept override
    {
        return this == &other;
    }

    /* Where it stays: callbacks are told its address. */
    std::unique_ptr<class params> params_;
    dcm_arena id_ = DCM_NO_ARENA_ID;
};

/* For containers. Does not own the arena, which must outlive them. */
template <typename T>
class allocator {
public:
    using value_type = T;
    using propagate_on_container_copy_assignment = std::true_type;
    using propagate_on_container_move_assignment = std::true_type;
    using propagate_on_container_swap = std::true_type;

    allocator(arena &arena) noexcept : arena_(&arena) {}

    template <typename U>
    allocator(const allocator<U> &other) noexcept : arena_(&other.resource())
    {
    }

    T *allocate(std::size_t count)
    {
        if (count > std::numeric_limits<std::size_t>::max() / sizeof(T))
            throw std::bad_array_new_length();
        return static_cast<T *>(arena_->allocate(count * sizeof(T), alignof(T)));
    }

    void deallocate(T *block, std::size_t) noexcept { dcm_free(block); }

    arena &resource() const noexcept { return *arena_; }

private:
    arena *arena_;
};

template <typename T, typename U>
bool operator==(const allocator<T> &a, const allocator<U> &b) noexcept
{
    return &a.resource() == &b.resource();
}

template <typename T, typename U>
bool operator!=(const allocator<T> &a, const allocator<U> &b) noexcept
{
    return !(a == b);
}

/* Keeps memory where it is for as long as it lives; see dcm_pin. */
class pin {
public:
    pin(const void *block, std::size_t bytes) { check(dcm_pin(block, bytes, &id_)); }
    pin(const pin &) = delete;
    pin &operator=(const pin &) = delete;
    ~pin() { dcm_unpin(id_); }

private:
    dcm_pin_id id_ = 0;
};

/* The capacity that several hosts share under a tag, as bytes to be read; see dcm_open_shared. */
class shared_extents {
public:
    explicit shared_extents(const std::string &tag)
    {
        check(dcm_open_shared(tag.c_str(), &data_, &size_));
    }

    shared_extents(shared_extents &&other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0))
    {
    }

    shared_extents(const shared_extents &) = delete;
    shared_extents &operator=(const shared_extents &) = delete;

    ~shared_extents() { dcm_close_shared(data_); }

    const std::byte *data() const noexcept { return static_cast<const std::byte *>(data_); }
    std::size_t size() const noexcept { return size_; }
    const std::byte *begin() const noexcept { return data(); }
    const std::byte *end() const noexcept { return data() + size_; }

    /* Whether the device has taken them by force: what is read since then means nothing. */
    bool is_lost() const noexcept { return dcm_shared_is_lost(data_) != 0; }

private:
    const void *data_ = nullptr;
    std::size_t size_ = 0;
};

/* Numbers and texts by name; see dcm_ctl. */
inline std::uint64_t number(const std::string &name)
{
    std::uint64_t value = 0;
    std::size_t size = sizeof value;
    check(dcm_ctl(name.c_str(), &value, &size, nullptr, 0));
    return value;
}

inline std::string text(const std::string &name)
{
    std::string text(64, '\0');
    for (;;) {
        std::size_t size = text.size();
        dcm_status status = dcm_ctl(name.c_str(), text.data(), &size, nullptr, 0);
        if (status != DCM_SIZE) {
            check(status);
            text.resize(size - 1);
            return text;
        }
        text.resize(size);
    }
}

/* What the heap holds, as JSON. */
inline std::string stats_json()
{
    std::string text(8192, '\0');
    text.resize(dcm_stats_json(text.data(), text.size()));
    return text;
}

/* Has the broker give capacity back to the device; the receipt, as JSON. */
inline std::string release(std::uint64_t bytes, std::chrono::milliseconds deadline)
{
    check(dcm_release(bytes, static_cast<std::uint64_t>(deadline.count())));
    std::string text(dcm_receipt_json(nullptr, 0) + 1, '\0');
    text.resize(dcm_receipt_json(text.data(), text.size()));
    return text;
}

} // namespace dcm

#endif
