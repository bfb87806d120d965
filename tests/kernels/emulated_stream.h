// csrc/cuda/stream.h on the CPU, and the names of CUDA that the linear nodes of few rows use as they are.
//
// A launch runs its blocks one after another, those of a cluster together. Strict beyond emulated_cuda.h: what the kernel before wrote appears
// only when the first thread waits for it, and a load that is not aligned, or beside the memory that a test allows,
// makes the launch fail.
#pragma once

#include "emulated_cuda.h"

#include <utility>

#define PYMLLM_EXPORT extern "C"
#define PYMLLM_SHARED(name) char* const name = reinterpret_cast<char*>(emulated::shared_of(emulated::rank()))
#define __global__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (emulated::Index{static_cast<unsigned>(emulated::cluster->current % emulated::cluster->threads)})
#define blockDim (emulated::Index{static_cast<unsigned>(emulated::cluster->threads)})
#define blockIdx (emulated::Index{emulated::block + emulated::rank()})
#define gridDim (emulated::Index{emulated::blocks})

struct uint2 { uint32_t x, y; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
struct dim3 {
    unsigned x;
    explicit dim3(unsigned wide) : x(wide) {}
};
using cudaStream_t = void*;

namespace emulated {

struct Index { unsigned x; };

// What the kernel before a launch wrote.
struct Late {
    int launch;
    void* to;
    const void* from;
    size_t bytes;
};

struct Span {
    const char *begin, *end;
};

inline unsigned block, blocks;  // the first one of those that run now, and all

// In its cluster, of the block that runs now.
inline unsigned rank() { return static_cast<unsigned>(cluster->current / cluster->threads); }

inline int launches;
inline bool waited;
inline bool dry;
inline int shared_asked, threads_asked;  // by the last launch
inline std::vector<Late> late;
inline std::vector<Span> spans;  // global memory that loads may touch, where there are any
inline int fault;                // a cudaError_t

constexpr int kInvalidValue = 1, kIllegalAddress = 700, kMisalignedAddress = 716;

// What a load finds; zeros and a fault where the hardware would refuse.
template <class T>
inline T loaded(const void* from) {
    T value{};
    const auto* first = static_cast<const char*>(from);
    const auto inside = [&](const Span& span) { return first >= span.begin && first + sizeof(T) <= span.end; };
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T))
        fault = kMisalignedAddress;
    else if (!spans.empty() && std::none_of(spans.begin(), spans.end(), inside))
        fault = kIllegalAddress;
    else
        std::memcpy(&value, from, sizeof(T));
    return value;
}

// Whether a copy may read 16 bytes, as for a load.
inline bool copy_allowed(const void* from) {
    const int before = std::exchange(fault, 0);
    loaded<uint4>(from);
    if (fault) return false;
    fault = before;
    return true;
}

inline void arrive() {
    if (waited) return;
    waited = true;
    for (const Late& each : late)
        if (each.launch == launches) std::memcpy(each.to, each.from, each.bytes);
}

inline uint32_t of_pairs(uint32_t a, uint32_t b, float (*operation)(float, float)) {
    const float2 x = unpack(a), y = unpack(b);
    return pack(operation(x.x, y.x), operation(x.y, y.y));
}

}  // namespace emulated

// `bytes` at `to` will hold what is at `from` when the launch of this number, counted from the last clear, has waited.
PYMLLM_EXPORT void emulated_arrives(int launch, void* to, const void* from, size_t bytes) {
    emulated::late.push_back({launch, to, from, bytes});
}

// Loads may touch these bytes, those of other calls, and nothing else.
PYMLLM_EXPORT void emulated_allows(const char* from, size_t bytes) { emulated::spans.push_back({from, from + bytes}); }

PYMLLM_EXPORT void emulated_clear() {
    emulated::launches = 0;
    emulated::late.clear();
    emulated::spans.clear();
    emulated::dry = false;
}

// From now on a launch runs nothing and is judged alone.
PYMLLM_EXPORT void emulated_dry() { emulated::dry = true; }

PYMLLM_EXPORT int emulated_shared() { return emulated::shared_asked; }

PYMLLM_EXPORT int emulated_threads() { return emulated::threads_asked; }

// ---- the functions of stream.h ----

inline uint4 load_once(const void* from) { return emulated::loaded<uint4>(from); }
inline uint32_t load_word_once(const void* from) { return emulated::loaded<uint32_t>(from); }
inline void prefetch_line(const void* from) { emulated::loaded<uint8_t>(from); }
inline uint4 load_shared_with_others(const void* from) { return emulated::loaded<uint4>(from); }

inline void multiply(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    struct Operands { uint32_t a[4], b[2]; };
    const auto all = emulated::gather(Operands{{a0, a1, a2, a3}, {b0, b1}});
    const int lane = emulated::lane();
    const auto code = [](uint32_t word, int k) { return static_cast<int8_t>(word >> k % 4 * 8); };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 32; ++k)
            d[i] += code(all[row % 8 * 4 + k % 16 / 4].a[row / 8 + k / 16 * 2], k) *
                    code(all[column * 4 + k % 16 / 4].b[k / 16], k);
    }
}

template <uint32_t MASK, uint32_t BITS>
inline uint32_t and_or(uint32_t word) { return (word & MASK) | BITS; }

inline uint32_t add_pair(uint32_t a, uint32_t b) {
    return emulated::of_pairs(a, b, [](float x, float y) { return x + y; });
}

inline float2 rounded_pair(float low, float high) { return unpack(pack(low, high)); }
inline float from_bfloat16(uint16_t bits) { return emulated::to_float(bits); }
inline uint16_t to_bfloat16(float value) { return emulated::from_float(value); }
inline int across(int value, int mask) { return emulated::exchange(value, emulated::lane() ^ mask); }

constexpr int kCuda = 1000;

template <typename... Parameters>
int launch_clusters(void (*kernel)(Parameters...), dim3 grid, int cluster, int threads, int shared, bool, cudaStream_t,
                    Parameters... arguments) {
    emulated::shared_asked = shared;
    emulated::threads_asked = threads;
    if (!grid.x || grid.x % cluster || threads % 32 || threads < 32 || threads > 1024 || shared > 227 << 10)
        return kCuda + emulated::kInvalidValue;
    if (emulated::dry) return 0;
    emulated::fault = 0;
    emulated::on_wait = emulated::arrive;
    emulated::may_copy = emulated::copy_allowed;
    emulated::waited = false;
    emulated::blocks = grid.x;
    for (emulated::block = 0; emulated::block < grid.x; emulated::block += cluster)
        emulated::run(cluster, threads, shared, [&](int, int) { kernel(arguments...); });
    ++emulated::launches;
    return emulated::fault ? kCuda + emulated::fault : 0;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, bool pdl, cudaStream_t stream,
           Parameters... arguments) {
    return launch_clusters(kernel, grid, 1, threads, shared, pdl, stream, arguments...);
}

// ---- CUDA's own ----

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Bytes of (high, low) by the nibbles of `order`, the first lowest.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t order) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> (order >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
    return sum;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyint(value)); }
inline float __expf(float value) { return std::exp(value); }
