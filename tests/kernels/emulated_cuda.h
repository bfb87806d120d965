// csrc/cuda/warp.h on the CPU: runs the very kernel that nvcc compiles, one fiber for each thread of a cluster.
//
// Strict where a GPU may be kind by chance: shared memory starts as NaN, an asynchronous copy takes what is there when
// it is asked for and arrives only when it is waited for, and threads that wait for each other for ever are reported. It knows nothing of memory ordering.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define DEVICE inline
#define HOST_DEVICE inline

using std::max;
using std::min;

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulated {

struct Copy {
    void* to;
    unsigned char bytes[16];
};

struct Barrier {
    int arrived = 0, turn = 0;
};

struct Warp {
    Barrier barrier;
    unsigned char given[2][32][64];
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::vector<std::vector<Copy>> groups{1};
    bool sees_cluster = false;  // has waited until all of the cluster had begun
    bool done = false;
};

constexpr size_t kStack = 128 << 10;

struct Cluster {
    int ranks, threads;  // blocks, and threads of a block
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Barrier> blocks;
    int begun = 0;
    std::vector<std::vector<uint16_t>> shared;
    std::function<void(int rank, int thread)> body;
    ucontext_t scheduler;
    int current = 0;
    long progress = 0;
};

inline Cluster* cluster;

// Called by each thread that waits for the kernel before.
inline void (*on_wait)();

// Called for each asynchronous copy: whether it may read 16 bytes from there.
inline bool (*may_copy)(const void* from);

inline void yield() { swapcontext(&cluster->fibers[cluster->current].context, &cluster->scheduler); }

inline int lane() { return cluster->current % 32; }

// Until `wanted` threads have arrived.
inline void meet(Barrier& barrier, int wanted) {
    const int turn = barrier.turn;
    ++barrier.arrived;
    ++cluster->progress;
    while (barrier.turn == turn) {
        if (barrier.arrived == wanted) {
            barrier.arrived = 0;
            ++barrier.turn;
            ++cluster->progress;
        } else {
            yield();
        }
    }
}

inline Warp& warp() { return cluster->warps[cluster->current / 32]; }

// What every lane of the warp gives: valid until the second exchange after this one.
template <class T>
inline const T& exchange(const T& value, int wanted) {
    static_assert(sizeof(T) <= 64);
    Warp& w = warp();
    auto& given = w.given[w.barrier.turn % 2];
    std::memcpy(given[lane()], &value, sizeof(T));
    meet(w.barrier, 32);
    return reinterpret_cast<const T&>(given[wanted]);
}

template <class T>
inline std::vector<T> gather(const T& value) {
    Warp& w = warp();
    auto& given = w.given[w.barrier.turn % 2];
    exchange(value, 0);
    std::vector<T> all(32);
    for (int i = 0; i < 32; ++i) std::memcpy(&all[i], given[i], sizeof(T));
    return all;
}

inline void enter(int index) {
    cluster->body(index / cluster->threads, index % cluster->threads);
    cluster->fibers[index].done = true;
    ++cluster->progress;
    yield();
}

// Run all threads of one cluster. The shared memory of every block is `bytes` of NaN.
inline void run(int ranks, int threads, size_t bytes, std::function<void(int, int)> body) {
    Cluster here{ranks, threads};
    cluster = &here;
    here.body = std::move(body);
    here.fibers.resize(ranks * threads);
    here.warps.resize(ranks * threads / 32);
    here.blocks.resize(ranks);
    here.shared.assign(ranks, std::vector<uint16_t>(bytes / 2 + 64, 0xffff));
    for (int i = 0; i < ranks * threads; ++i) {
        Fiber& fiber = here.fibers[i];
        fiber.stack.reset(new char[kStack]);  // untouched: most of it never is used
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &here.scheduler;
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 1, i);
    }
    for (bool left = true; left;) {
        left = false;
        const long before = here.progress;
        for (here.current = 0; here.current < ranks * threads; ++here.current) {
            if (here.fibers[here.current].done) continue;
            left = true;
            swapcontext(&here.scheduler, &here.fibers[here.current].context);
        }
        if (left && here.progress == before) {
            std::fprintf(stderr, "threads wait for each other for ever\n");
            std::abort();
        }
    }
    for (const auto& memory : here.shared) {
        if (std::any_of(memory.begin() + bytes / 2, memory.end(), [](uint16_t half) { return half != 0xffff; })) {
            std::fprintf(stderr, "a block wrote behind its %zu bytes of shared memory\n", bytes);
            std::abort();
        }
    }
}

inline uint16_t* shared_of(int rank) { return cluster->shared[rank].data(); }

inline float to_float(uint16_t bits) {
#if PYMLLM_HALF
    _Float16 value;
    std::memcpy(&value, &bits, 2);
    return static_cast<float>(value);
#else
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
#endif
}

inline uint16_t from_float(float value) {
    uint16_t bits;
#if PYMLLM_HALF
    const auto half = static_cast<_Float16>(value);
    std::memcpy(&bits, &half, 2);
#else
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = value != value ? 0x7fff : static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
#endif
    return bits;
}

inline uint16_t half_of(uint32_t pair, int high) { return static_cast<uint16_t>(high ? pair >> 16 : pair); }

}  // namespace emulated

// ---- the functions of warp.h ----

inline float2 unpack(uint32_t pair) {
    return {emulated::to_float(emulated::half_of(pair, 0)), emulated::to_float(emulated::half_of(pair, 1))};
}

inline uint32_t pack(float low, float high) {
    return emulated::from_float(low) | static_cast<uint32_t>(emulated::from_float(high)) << 16;
}

inline uint32_t multiply_pair(uint32_t a, uint32_t b) {
    const float2 x = unpack(a), y = unpack(b);
    return pack(x.x * y.x, x.y * y.y);
}

inline float exp_2(float x) { return std::exp2(x); }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline float inverse(float x) { return 1.0f / x; }

template <class T>
inline T from_lane(T value, int lane) { return emulated::exchange(value, lane); }

inline float across(float value, int mask) { return emulated::exchange(value, emulated::lane() ^ mask); }

inline void sync_warp() { emulated::exchange(0, 0); }

inline void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    struct Operands { uint32_t a[4], b[2]; };
    const auto all = emulated::gather(Operands{{a0, a1, a2, a3}, {b0, b1}});
    const int lane = emulated::lane();
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        double sum = d[i];
        for (int k = 0; k < 16; ++k) {
            const uint32_t a = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
            const uint32_t b = all[column * 4 + k % 8 / 2].b[k / 8];
            sum += static_cast<double>(emulated::to_float(emulated::half_of(a, k % 2))) *
                   emulated::to_float(emulated::half_of(b, k % 2));
        }
        d[i] = static_cast<float>(sum);
    }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
    const auto rows = emulated::gather(row);
    const int lane = emulated::lane();
    for (int i = 0; i < 4; ++i) r[i] = static_cast<const uint32_t*>(rows[8 * i + lane / 4])[lane % 4];
}

inline void load_transposed(uint32_t (&r)[4], const void* row) {
    const auto rows = emulated::gather(row);
    const int lane = emulated::lane();
    for (int i = 0; i < 4; ++i) {
        uint16_t two[2];
        for (int h = 0; h < 2; ++h)
            two[h] = static_cast<const uint16_t*>(rows[8 * i + lane % 4 * 2 + h])[lane / 4];
        r[i] = two[0] | static_cast<uint32_t>(two[1]) << 16;
    }
}

inline uint32_t transpose(uint32_t pair) {
    const auto all = emulated::gather(pair);
    const int lane = emulated::lane(), column = lane / 4;
    uint16_t two[2];
    for (int h = 0; h < 2; ++h)
        two[h] = emulated::half_of(all[(lane % 4 * 2 + h) * 4 + column / 2], column % 2);
    return two[0] | static_cast<uint32_t>(two[1]) << 16;
}

inline std::vector<std::vector<emulated::Copy>>& copies() {
    return emulated::cluster->fibers[emulated::cluster->current].groups;
}

inline void copy_async(void* shared, const void* global, bool valid) {
    emulated::Copy copy{shared, {}};
    if (valid && (!emulated::may_copy || emulated::may_copy(global))) std::memcpy(copy.bytes, global, 16);
    copies().back().push_back(copy);
}

inline void copy_commit() { copies().emplace_back(); }

template <int kLeft>
inline void copy_wait() {
    auto& groups = copies();  // the last one is not committed yet
    while (static_cast<int>(groups.size()) - 1 > kLeft) {
        for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
        groups.erase(groups.begin());
    }
}

inline float2 load_l2(const float* pointer) { return {pointer[0], pointer[1]}; }

inline int add_ordered(int32_t* counter, int value) {
    *counter += value;
    return *counter - value;
}

inline void sync_block() {
    emulated::meet(emulated::cluster->blocks[emulated::cluster->current / emulated::cluster->threads],
                   emulated::cluster->threads);
}

inline void launch_dependents() {}

inline void wait_for_previous() {
    if (emulated::on_wait) emulated::on_wait();
}

// All threads of the cluster arrive, and some wait for the others.
inline void arrive_begun() {
    ++emulated::cluster->begun;
    ++emulated::cluster->progress;
}

inline void wait_begun() {
    while (emulated::cluster->begun < emulated::cluster->ranks * emulated::cluster->threads) emulated::yield();
    emulated::cluster->fibers[emulated::cluster->current].sees_cluster = true;
}

inline void expect_pushes(uint64_t* barrier, int bytes) { *barrier = bytes; }

inline void wait_pushes(uint64_t* barrier) {
    while (*barrier) emulated::yield();
}

inline void push(float* to, float2 value, uint64_t* barrier) {
    if (!emulated::cluster->fibers[emulated::cluster->current].sees_cluster) {
        std::fprintf(stderr, "a thread pushes before the cluster's first block is known to have begun\n");
        std::abort();
    }
    auto* here = reinterpret_cast<char*>(emulated::shared_of(emulated::cluster->current / emulated::cluster->threads));
    auto* there = reinterpret_cast<char*>(emulated::shared_of(0));
    std::memcpy(there + (reinterpret_cast<char*>(to) - here), &value, 8);
    *reinterpret_cast<uint64_t*>(there + (reinterpret_cast<char*>(barrier) - here)) -= 8;
    ++emulated::cluster->progress;
}
