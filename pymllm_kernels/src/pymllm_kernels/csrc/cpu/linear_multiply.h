// The product of a few packed rows and one weight tile, by number of rows.
#pragma once

#include <array>
#include <utility>

#include "dot_tile.h"
#include "linear.h"

namespace pymllm {

// Bytes by which the weight stream is prefetched ahead of its use, where several rows share it:
// 8 KB cover 200 ns of memory latency at 40 GB/s, more than the out-of-order window does with
// 8 rows of arithmetic between two loads. A single row is limited by memory alone and the
// hardware prefetchers do better without help.
constexpr int kAhead = 8192;

// Neighbouring weight tiles taken together by a single row: 4 x 2 chains hide the latency of the
// dot instructions, and the four streams are read at memory speed.
constexpr int kOneRowTiles = 4;

inline __m512 load_sums(const float* p) { return _mm512_loadu_ps(p); }
inline i32x16 load_sums(const int32_t* p) { return (i32x16)_mm512_loadu_si512(p); }
inline void store_sums(float* p, __m512 v) { _mm512_storeu_ps(p, v); }
inline void store_sums(int32_t* p, i32x16 v) { _mm512_storeu_si512(p, (__m512i)v); }

// Adds the product of MR rows and NT neighbouring weight tiles over `steps` dwords to `sums`
// (to zero when `fresh`). a: [steps][MR]. Tile j lies at w + j * tile_stride and has its sums at
// sums + j * tile_sums, [MR][32]. Sum: float for bf16, int32_t for 8-bit integers.
template <int MR, int NT, int AHEAD, typename Sum>
void multiply(const uint32_t* a, const uint32_t* w, int64_t tile_stride, int64_t steps, Sum* sums,
              int64_t tile_sums, bool fresh) {
    constexpr int kVecs = NT * kTileVecs;
    auto at = [&](int m, int v) {
        return sums + v / kTileVecs * tile_sums + m * kTileCols + v % kTileVecs * kLanes;
    };
    decltype(load_sums(sums)) acc[MR][kVecs];
    if (fresh) {
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v) acc[m][v] = decltype(load_sums(sums)){};
        }
    } else {
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
            for (int v = 0; v < kVecs; ++v) acc[m][v] = load_sums(at(m, v));
        }
    }
    dot_tile<MR, kVecs, AHEAD>(a, 1, MR, w, tile_stride, kTileCols, steps, acc);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) store_sums(at(m, v), acc[m][v]);
    }
}

template <typename Sum>
using Multiply = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, Sum*, int64_t, bool);

template <int AHEAD, typename Sum, int... Less>
constexpr std::array<Multiply<Sum>, kRowTile> multiply_table(std::integer_sequence<int, Less...>) {
    return {multiply<Less + 1, 1, (Less > 0 ? AHEAD : 0), Sum>...};
}

// By rows - 1; the first pass over a weight block prefetches, later ones find it in the cache.
template <typename Sum>
constexpr auto kFirstPass = multiply_table<kAhead, Sum>(
    std::make_integer_sequence<int, kRowTile>{});
template <typename Sum>
constexpr auto kLaterPass = multiply_table<0, Sum>(std::make_integer_sequence<int, kRowTile>{});

// One row takes `tiles` neighbouring tiles, several rows one tile; see `multiply`.
template <typename Sum>
void multiply_few(int rows, int tiles, const uint32_t* panel, const PackedLinear& packed,
                  int64_t t, Sum* sums) {
    const uint32_t* w = packed.at(t, 0);
    if (tiles == 1) {
        kFirstPass<Sum>[rows - 1](panel, w, 0, packed.dwords, sums, 0, true);
    } else {
        multiply<1, kOneRowTiles, 0>(panel, w, packed.dwords * kTileCols, packed.dwords, sums,
                                     kTileCols, true);
    }
}

}  // namespace pymllm
