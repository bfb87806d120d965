// csrc/cuda/hopper.h on the CPU.
//
// Strict beyond emulated_stream.h: every other tile arrives only when its barrier is waited for, the others at once, so that a
// stage that is written too early or read too early gives wrong numbers; a barrier refuses more arrivals than it was made
// for, and a tile a place that is not a multiple of 1024 bytes.
#pragma once

#include "emulated_stream.h"

#include <map>

#define PYMLLM_SHARED_TILES(name) PYMLLM_SHARED(name)

struct TileMap {
    const char* base;
    int64_t rows, columns, stride;
    int height;
};

constexpr int TILE_COLUMNS = 64;

namespace emulated {

struct Phases {
    int32_t bytes;  // expected and not yet there
    int8_t left, arrivals;
    uint8_t parity, made;
};
static_assert(sizeof(Phases) == 8);

// On its way to a block's shared memory.
struct Tile {
    char* to;
    std::vector<char> bytes;
};

inline std::map<Phases*, std::vector<Tile>> under_way;
inline std::map<int, Barrier> groups, consumers;  // of four warps of a block; of a block
inline unsigned tiles;

[[noreturn]] inline void refuse(const char* what) {
    std::fprintf(stderr, "%s\n", what);
    std::abort();
}

inline Phases* phases(uint64_t* barrier) { return reinterpret_cast<Phases*>(barrier); }

// The same place in the shared memory of another block of the cluster.
template <class T>
T* at_rank(T* here, int rank) {
    const auto offset = reinterpret_cast<char*>(here) - reinterpret_cast<char*>(shared_of(emulated::rank()));
    return reinterpret_cast<T*>(reinterpret_cast<char*>(shared_of(rank)) + offset);
}

inline void must_see_cluster() {
    if (cluster->ranks > 1 && !cluster->fibers[cluster->current].sees_cluster)
        refuse("a thread reaches for another block before it is known to have begun");
}

inline void settle(Phases* barrier) {
    ++cluster->progress;
    if (barrier->left || barrier->bytes) return;
    barrier->parity ^= 1;
    barrier->left = barrier->arrivals;
}

inline void arrive(Phases* barrier, int bytes) {
    if (!barrier->made || barrier->left < 1) refuse("more arrive at a barrier than it waits for");
    --barrier->left;
    barrier->bytes += bytes;
    settle(barrier);
}

inline void deliver(Phases* barrier, const Tile& tile) {
    std::memcpy(tile.to, tile.bytes.data(), tile.bytes.size());
    barrier->bytes -= static_cast<int>(tile.bytes.size());
    settle(barrier);
}

inline Barrier& group() { return groups[static_cast<int>(rank()) * 8 + cluster->current % cluster->threads / 128]; }

}  // namespace emulated

inline int map_tiles(TileMap& map, const void* base, int64_t rows, int64_t columns, int64_t stride, int height) {
    const bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 16 == 0;
    if (!aligned || height < 1 || height > 256 || rows < 1) return kCuda + emulated::kInvalidValue;
    map = {static_cast<const char*>(base), rows, columns, stride, height};
    return 0;
}

inline void prefetch_map(const TileMap&) {}

inline void init_barrier(uint64_t* barrier, int arrivals) {
    *emulated::phases(barrier) = {0, static_cast<int8_t>(arrivals), static_cast<int8_t>(arrivals), 0, 1};
    emulated::under_way.erase(emulated::phases(barrier));
}

inline void publish_barriers() {}

inline void arrive_expecting(uint64_t* barrier, int bytes) { emulated::arrive(emulated::phases(barrier), bytes); }

inline void arrive(uint64_t* barrier) { emulated::arrive(emulated::phases(barrier), 0); }

inline void wait_phase(uint64_t* barrier, int parity) {
    auto* const phases = emulated::phases(barrier);
    while (phases->parity == parity) {
        auto& tiles = emulated::under_way[phases];
        if (tiles.empty()) {
            emulated::yield();
        } else {
            emulated::deliver(phases, tiles.back());
            tiles.pop_back();
        }
    }
}

inline void sync_threads(int threads) {
    emulated::meet(emulated::consumers[static_cast<int>(emulated::rank())], threads);
}

inline int tile_offset(int row, int piece) { return 128 * row + 16 * (piece ^ (row & 7)); }

inline void publish_tile() {}

inline void push_to(int rank, float* to, float2 value, uint64_t* barrier) {
    emulated::must_see_cluster();
    std::memcpy(emulated::at_rank(to, rank), &value, sizeof(value));
    auto* const there = emulated::phases(emulated::at_rank(barrier, rank));
    there->bytes -= sizeof(value);
    emulated::settle(there);
}

inline void fetch_tile(void* to, const TileMap& map, int column, int row, uint64_t* barrier) {
    const auto offset = static_cast<char*>(to) - reinterpret_cast<char*>(emulated::shared_of(static_cast<int>(emulated::rank())));
    if (offset % 1024) emulated::refuse("a tile begins at no multiple of 1024 bytes");
    emulated::Tile tile{static_cast<char*>(to), std::vector<char>(map.height * 128)};
    for (int r = 0; r < map.height; ++r) {
        for (int i = 0; i < TILE_COLUMNS; ++i) {
            if (row + r >= map.rows || column + i >= map.columns) continue;
            const auto value = emulated::loaded<uint16_t>(map.base + (row + r) * map.stride + 2 * (column + i));
            std::memcpy(tile.bytes.data() + tile_offset(r, i / 8) + 2 * (i % 8), &value, 2);
        }
    }
    auto* const phases = emulated::phases(barrier);
    if (emulated::tiles++ % 2)
        emulated::deliver(phases, tile);
    else
        emulated::under_way[phases].push_back(std::move(tile));
}

template <int X_ROWS>
struct Sums {
    float of[X_ROWS / 2];
};

// In units of 16 bytes from the begin of the block's shared memory.
inline uint64_t described(const void* tile) {
    auto* const base = reinterpret_cast<char*>(emulated::shared_of(static_cast<int>(emulated::rank())));
    return (static_cast<const char*>(tile) - base) / 16;
}

template <int X_ROWS>
inline void multiply_tiles(Sums<X_ROWS>& sums, uint64_t weight, uint64_t x) {
    emulated::meet(emulated::group(), 128);
    const auto* const base = reinterpret_cast<char*>(emulated::shared_of(static_cast<int>(emulated::rank())));
    const auto number = [&](uint64_t tile, int row, int k) {
        uint16_t bits;  // `tile` has the column, too, in units of 16 bytes
        const uint64_t at = 16 * tile + 128 * row + 2 * k;
        std::memcpy(&bits, base + (at ^ (at / 128 & 7) << 4), 2);
        return static_cast<double>(emulated::to_float(bits));
    };
    const int thread = emulated::cluster->current % emulated::cluster->threads % 128;
    for (int b = 0; b < 2; ++b) {
        double row[16];
        for (int k = 0; k < 16; ++k) row[k] = number(weight, thread / 32 * 16 + thread / 4 % 8 + 8 * b, k);
        for (int c = 0; c < X_ROWS / 8; ++c) {
            for (int a = 0; a < 2; ++a) {
                double sum = sums.of[4 * c + 2 * b + a];
                for (int k = 0; k < 16; ++k) sum += row[k] * number(x, 8 * c + thread % 4 * 2 + a, k);
                sums.of[4 * c + 2 * b + a] = static_cast<float>(sum);
            }
        }
    }
}

inline void begin_products() {}

// Here all of a group have multiplied.
inline void commit_products() { emulated::meet(emulated::group(), 128); }

template <int LEFT>
inline void wait_products() {}

template <int X_ROWS>
inline void hold(Sums<X_ROWS>&) {}
