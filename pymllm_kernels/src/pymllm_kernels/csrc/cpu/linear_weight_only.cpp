// The linear layers of 4-bit and 8-bit integer weights and bf16 activations: operations
// w4a16_linear and w8a16_linear. Weights stay packed in memory.
//
// With the codes q, scales s and zero points z of group g, and the sum X_g of x over the group,
// y = sum_g s_g (sum_k x_k q_k - z_g X_g): codes are exact in bf16, so that nothing but the fp32
// sums is rounded. Each group is one chain from zero, the groups are one chain of fma, and one
// group alone (a scale a column) is scaled at the end.
#include "linear_run.h"
#include "unpack.h"

namespace pymllm {
namespace {

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

// The weights of NT tiles are read side by side. Unpacking fills the out-of-order window before
// enough loads are under way, so the stream is prefetched: 16 dwords a column ahead, and at the
// end of a tile from the tiles that follow (measured: a third faster than without).
template <int NT>
class Streams {
public:
    Streams(const PackedLinear& packed, int64_t t)
        : w_(packed.at(t, 0)),
          next_(w_ + kSteps * kTileCols),
          stride_(packed.dwords * kTileCols),
          left_(packed.dwords - kSteps) {}

    const uint32_t* vec(int v) const { return w_ + v / kTileVecs * stride_ + v % kTileVecs * kLanes; }

    void advance() {
        if (left_-- == 0) next_ += (NT - 1) * stride_;
#pragma GCC unroll 8
        for (int v = 0; v < NT * kTileVecs; ++v) {
            _mm_prefetch(reinterpret_cast<const char*>(next_ + v / kTileVecs * stride_ +
                                                       v % kTileVecs * kLanes),
                         _MM_HINT_T0);
        }
        w_ += kTileCols;
        next_ += kTileCols;
    }

private:
    static constexpr int kSteps = 16;
    const uint32_t* w_;
    const uint32_t* next_;
    int64_t stride_;
    int64_t left_;
};

// MR rows and NT whole tiles, unpacked in registers. panel: [pairs][MR]. sums: [NT][MR][32].
template <typename Codes, int MR, int NT>
void multiply_packed(const PackedWeightOnly& w, const uint32_t* panel, int64_t t,
                     const float* x_sums, float* sums) {
    constexpr int kVecs = NT * kTileVecs;
    const Codes codes;
    Streams<NT> streams(w.linear, t);
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
                for (int v = 0; v < kVecs; ++v) column[v] = codes.pair(streams.vec(v), j);
#pragma GCC unroll 16
                for (int m = 0; m < MR; ++m) {
                    const __m512i row = _mm512_set1_epi32(static_cast<int>(panel[j * MR + m]));
#pragma GCC unroll 8
                    for (int v = 0; v < kVecs; ++v) acc[m][v] = dot(acc[m][v], row, column[v]);
                }
            }
            panel += Codes::kPairs * MR;
            streams.advance();
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
constexpr int few_tiles_of(int rows) { return rows == 1 ? 4 : rows <= 4 ? 2 : 1; }

using MultiplyPacked = void (*)(const PackedWeightOnly&, const uint32_t*, int64_t, const float*,
                                float*);
template <typename Codes, bool ONE_TILE, int... Less>
constexpr std::array<MultiplyPacked, kRowTile> packed_table(std::integer_sequence<int, Less...>) {
    return {multiply_packed<Codes, Less + 1, (ONE_TILE ? 1 : few_tiles_of(Less + 1))>...};
}
template <typename Codes, bool ONE_TILE>
constexpr auto kMultiplyPacked =
    packed_table<Codes, ONE_TILE>(std::make_integer_sequence<int, kRowTile>{});

template <typename Codes>
struct WeightOnly {
    using Sum = float;
    using Note = float;
    const PackedWeightOnly& weight;
    const PackedLinear& packed;
    int64_t panel_dwords;
    int64_t block_dwords;
    int64_t notes;

    // A block is unpacked once and then meets all rows; its size is that of bf16.
    explicit WeightOnly(const PackedWeightOnly& w)
        : weight(w),
          packed(w.linear),
          panel_dwords(w.linear.dwords * Codes::kPairs),
          block_dwords(512),
          notes(w.zero_point == nullptr ? 0 : w.groups) {
        if (w.groups > 1) {
            block_dwords = std::max<int64_t>(block_dwords / w.group_pairs, 1) * w.group_pairs;
        }
    }

    int64_t row_bytes(int64_t k) const { return weight.order == nullptr ? 2 * k : 4 * panel_dwords; }

    // The order of the groups, and the sums of x over each.
    const void* prepare(const bf16* x, bf16* dst, int64_t k, Note* x_sums) const {
        if (weight.order != nullptr) {
            x = reorder(x, dst, k);
            k = 2 * panel_dwords;
        }
        for (int64_t g = 0; g < notes; ++g) {
            const int64_t begin = 2 * g * weight.group_pairs;
            const int64_t end = std::min(begin + 2 * weight.group_pairs, k);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = begin; i < end; i += kLanes) {
                sum = _mm512_add_ps(sum, load_bf16(x + i, first_lanes(end - i)));
            }
            x_sums[g] = _mm512_reduce_add_ps(sum);
        }
        return x;
    }

    static int few_tiles(int rows) { return few_tiles_of(rows); }

    void few(int rows, int tiles, const uint32_t* panel, const float* x_sums, int64_t t,
             float* sums) const {
        (tiles == 1 ? kMultiplyPacked<Codes, true> : kMultiplyPacked<Codes, false>)[rows - 1](
            weight, panel, t, x_sums, sums);
    }

    void multiply(bool first, int rows, const uint32_t* panel, const float* x_sums, int64_t t,
                  int64_t d0, int64_t steps, float* sums) const {
        thread_local Scratch scratch;
        auto* block = scratch.get<uint32_t>(block_dwords * kTileCols * sizeof(uint32_t));
        if (first) unpack(t, d0, steps, block);
        if (weight.groups == 1) {
            kLaterPass<float>[rows - 1](panel, block, 0, steps, sums, 0, d0 == 0);
        } else {
            kMultiplyGroups[rows - 1](weight, panel, block, t, d0 / weight.group_pairs,
                                      steps / weight.group_pairs, x_sums, sums);
        }
    }

    void finish(const float* sums, const float* x_sums, int64_t t, __m512 (&y)[kTileVecs]) const {
        for (int v = 0; v < kTileVecs; ++v) {
            y[v] = _mm512_loadu_ps(sums + v * kLanes);
            if (weight.groups > 1) continue;
            const Affine affine(weight, t, 0, v);
            if (weight.zero_point != nullptr) {
                y[v] = _mm512_fnmadd_ps(affine.zero_point, _mm512_set1_ps(x_sums[0]), y[v]);
            }
            y[v] = _mm512_mul_ps(affine.scale, y[v]);
        }
    }

private:
    const bf16* reorder(const bf16* x, bf16* dst, int64_t k) const {
        thread_local Scratch scratch;
        if (x == dst) {
            auto* copy = scratch.get<bf16>(k * sizeof(bf16));
            x = static_cast<const bf16*>(std::memcpy(copy, x, k * sizeof(bf16)));
        }
        for (int64_t i = 0; i < 2 * panel_dwords; ++i) {
            dst[i] = weight.order[i] < 0 ? bf16{0} : x[weight.order[i]];
        }
        return dst;
    }

    // Pairs [d0, d0 + steps) of tile `t`: [steps][32].
    void unpack(int64_t t, int64_t d0, int64_t steps, uint32_t* to) const {
        const Codes codes;
        const uint32_t* from = packed.at(t, d0 / Codes::kPairs);
        for (int64_t s = 0; s < steps; s += Codes::kPairs) {
#pragma GCC unroll 2
            for (int v = 0; v < kTileVecs; ++v) {
                _mm_prefetch(reinterpret_cast<const char*>(from + v * kLanes) + kAhead / 2,
                             _MM_HINT_T0);
#pragma GCC unroll 4
                for (int j = 0; j < Codes::kPairs; ++j) {
                    _mm512_storeu_si512(to + j * kTileCols + v * kLanes,
                                        codes.pair(from + v * kLanes, j));
                }
            }
            from += kTileCols;
            to += Codes::kPairs * kTileCols;
        }
    }
};

}  // namespace
}  // namespace pymllm

// Arguments as in LinearCall.
extern "C" void pymllm_weight_only_linear(const void* packed, const pymllm::bf16* x, int64_t ldx,
                                          int64_t m, int64_t k, const pymllm::bf16* norm,
                                          float eps, const pymllm::bf16* residual, int64_t ldr,
                                          void* out, int out_f32, int threads) {
    using namespace pymllm;
    const LinearCall call{x, ldx, m, k, norm, eps, residual, ldr, out, out_f32 != 0};
    const auto& weight = *static_cast<const PackedWeightOnly*>(packed);
    if (weight.bits == 4) {
        run_linear(WeightOnly<Int4Codes>(weight), call, threads);
    } else {
        run_linear(WeightOnly<Int8Codes>(weight), call, threads);
    }
}
