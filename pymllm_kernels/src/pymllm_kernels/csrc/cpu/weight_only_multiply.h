// The product of a few rows and integer weights, packed or unpacked, group by group.
#pragma once

#include "linear_multiply.h"
#include "unpack.h"

namespace pymllm {

// Mirrored in Python. scale: [tiles][groups][32]. zero_point: the same, or null. order: where the
// groups are not consecutive columns of x, the column that stands at each place [groups][2 *
// group_pairs], -1 for none, else null.
struct PackedWeightOnly {
    PackedLinear linear;
    const bf16* scale;
    const int8_t* zero_point;
    int64_t groups;
    int64_t group_pairs;  // pairs of x in a group
    int64_t bits;         // 4 or 8
    const int32_t* order;
};

// Scale and zero point of 16 columns and one group.
struct Affine {
    __m512 scale;
    __m512 zero_point;

    Affine(const PackedWeightOnly& w, int64_t t, int64_t g, int v) {
        const int64_t at = (t * w.groups + g) * kTileCols + v * kLanes;
        scale = load_bf16(w.scale + at, 0xFFFF);
        zero_point = w.zero_point == nullptr ? _mm512_setzero_ps()
                                             : _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(
                                                   reinterpret_cast<const __m128i*>(w.zero_point + at))));
    }
};

// Requests scales and zero points of group g of NT tiles: each is a line of its own.
template <int NT>
void prefetch_affine(const PackedWeightOnly& w, int64_t t, int64_t g) {
#pragma GCC unroll 4
    for (int j = 0; j < NT; ++j) {
        const int64_t at = ((t + j) * w.groups + g) * kTileCols;
        __builtin_prefetch(w.scale + at);
        if (w.zero_point != nullptr) __builtin_prefetch(w.zero_point + at);
    }
}

// Adds the chains of group g, of MR rows and NT neighbouring tiles, to sums [NT][MR][32] (to zero
// when g is 0). x_sums: [MR][groups] where there are zero points.
template <int MR, int NT>
inline __attribute__((always_inline)) void add_group(const PackedWeightOnly& w, int64_t t, int64_t g,
                                                     __m512 (&acc)[MR][NT * kTileVecs],
                                                     const float* x_sums, float* sums) {
#pragma GCC unroll 8
    for (int v = 0; v < NT * kTileVecs; ++v) {
        const Affine affine(w, t + v / kTileVecs, g, v % kTileVecs);
        if (w.zero_point != nullptr) {
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m) {
                const __m512 x_sum = _mm512_set1_ps(x_sums[m * w.groups + g]);
                acc[m][v] = _mm512_fnmadd_ps(affine.zero_point, x_sum, acc[m][v]);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
            float* at = sums + (v / kTileVecs * MR + m) * kTileCols + v % kTileVecs * kLanes;
            const __m512 before = g == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(at);
            _mm512_storeu_ps(at, _mm512_fmadd_ps(affine.scale, acc[m][v], before));
        }
    }
}

// Groups [g0, g0 + count) of MR rows and one unpacked tile.
template <int MR>
void multiply_groups(const PackedWeightOnly& w, const uint32_t* a, const uint32_t* b, int64_t t,
                     int64_t g0, int64_t count, const float* x_sums, float* sums) {
    for (int64_t g = g0; g < g0 + count; ++g) {
        __m512 acc[MR][kTileVecs];
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
        dot_tile<MR, kTileVecs, 0>(a, 1, MR, b, 0, kTileCols, w.group_pairs, acc);
        a += w.group_pairs * MR;
        b += w.group_pairs * kTileCols;
        add_group<MR, 1>(w, t, g, acc, x_sums, sums);
    }
}

using MultiplyGroups = void (*)(const PackedWeightOnly&, const uint32_t*, const uint32_t*, int64_t,
                                int64_t, int64_t, const float*, float*);
template <int... Less>
constexpr std::array<MultiplyGroups, kRowTile> groups_table(std::integer_sequence<int, Less...>) {
    return {multiply_groups<Less + 1>...};
}
constexpr auto kMultiplyGroups = groups_table(std::make_integer_sequence<int, kRowTile>{});

// Unpacking fills the out-of-order window before enough loads are under way, so the weights are
// prefetched: 16 dwords a column, which are 8 KB of the four tiles that alternate. Measured on
// Zen 5, one row reads 39 GB/s with this, 33 without, and 33 from four separate tiles.
constexpr int64_t kStepsAhead = 16;

template <int LINES>
inline void prefetch(const uint32_t* at) {
#pragma GCC unroll 8
    for (int i = 0; i < LINES; ++i) {
        _mm_prefetch(reinterpret_cast<const char*>(at + i * kLanes), _MM_HINT_T0);
    }
}

// MR rows and NT whole tiles side by side, unpacked in registers. panel: [pairs][MR]. sums: [NT][MR][32].
template <typename Codes, int MR, int NT>
void multiply_packed(const PackedWeightOnly& w, const uint32_t* panel, int64_t t,
                     const float* x_sums, float* sums) {
    constexpr int kVecs = NT * kTileVecs;
    const Codes codes;
    const uint32_t* at = w.linear.at(t, 0);
    // Where fewer than four tiles are read at once, memory has to deliver at an even pace, too: each
    // step asks for as many dwords as it uses, of the four tiles that follow.
    const uint32_t* next = w.linear.weight + (t + w.linear.span) * w.linear.dwords * kTileCols;
    const int64_t step = w.linear.step(t);
    const int64_t steps = w.linear.dwords / w.groups;
    for (int64_t g = 0; g < w.groups; ++g) {
        __m512 acc[MR][kVecs];
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) acc[m][v] = _mm512_setzero_ps();
        }
        for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 4
            for (int j = 0; j < Codes::kPairs; ++j) {
                __m512i column[kVecs];
#pragma GCC unroll 8
                for (int v = 0; v < kVecs; ++v) column[v] = codes.pair(at + v * kLanes, j);
#pragma GCC unroll 16
                for (int m = 0; m < MR; ++m) {
                    const __m512i row = _mm512_set1_epi32(static_cast<int>(panel[j * MR + m]));
#pragma GCC unroll 8
                    for (int v = 0; v < kVecs; ++v) acc[m][v] = dot(acc[m][v], row, column[v]);
                }
            }
            panel += Codes::kPairs * MR;
            prefetch<kVecs>(NT == 4 ? at + kStepsAhead * step : next);
            at += step;
            next += NT * kTileCols;
        }
        if (w.groups > 1) {
            add_group<MR, NT>(w, t, g, acc, x_sums, sums);
            prefetch_affine<NT>(w, t + NT, g);
            continue;
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; ++v) {
                _mm512_storeu_ps(sums + (v / kTileVecs * MR + m) * kTileCols + v % kTileVecs * kLanes,
                                 acc[m][v]);
            }
        }
    }
}

// 8 chains hide the latency of the dot instruction and the unpacking before it.
constexpr int few_tiles_of(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

using MultiplyPacked = void (*)(const PackedWeightOnly&, const uint32_t*, int64_t, const float*,
                                float*);
template <typename Codes, bool ONE_TILE, int... Less>
constexpr std::array<MultiplyPacked, kRowTile> packed_table(std::integer_sequence<int, Less...>) {
    return {multiply_packed<Codes, Less + 1, (ONE_TILE ? 1 : few_tiles_of(Less + 1))>...};
}
template <typename Codes, bool ONE_TILE>
constexpr auto kMultiplyPacked =
    packed_table<Codes, ONE_TILE>(std::make_integer_sequence<int, kRowTile>{});

}  // namespace pymllm
