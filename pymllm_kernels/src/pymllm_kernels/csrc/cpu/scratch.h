// Grow-only scratch memory, one set of buffers per thread, kept between calls.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace pymllm {

class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    // At least `bytes` bytes, 64-byte aligned. The contents do not survive a call.
    template <typename T>
    T* get(size_t bytes) {
        if (bytes > capacity_) grow(bytes);
        return static_cast<T*>(data_);
    }

private:
    void grow(size_t bytes) {
        constexpr size_t kHuge = size_t{2} << 20;
        // Large buffers get huge pages: fewer TLB misses in the packed x panels.
        const size_t align = bytes >= kHuge ? kHuge : 4096;
        const size_t rounded = (bytes + align - 1) / align * align;
        std::free(data_);
        data_ = nullptr;
        capacity_ = 0;
        data_ = std::aligned_alloc(align, rounded);
        if (data_ == nullptr) throw std::bad_alloc();
        if (align == kHuge) madvise(data_, rounded, MADV_HUGEPAGE);
        capacity_ = rounded;
    }

    void* data_ = nullptr;
    size_t capacity_ = 0;
};

}  // namespace pymllm
