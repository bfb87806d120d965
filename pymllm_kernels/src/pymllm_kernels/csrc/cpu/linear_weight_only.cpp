// The linear layers of 4-bit and 8-bit integer weights and bf16 activations: operations
// w4a16_linear and w8a16_linear. Weights stay packed in memory.
//
// With the codes q, scales s and zero points z of group g, and the sum X_g of x over the group,
// y = sum_g s_g (sum_k x_k q_k - z_g X_g): codes are exact in bf16, so that nothing but the fp32
// sums is rounded. Each group is one chain from zero, the groups are one chain of fma, and one
// group alone (a scale a column) is scaled at the end.
#include "linear_run.h"
#include "weight_only_multiply.h"

namespace pymllm {
namespace {

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
        const int64_t step = packed.step(t);
        for (int64_t s = 0; s < steps; s += Codes::kPairs) {
#pragma GCC unroll 2
            for (int v = 0; v < kTileVecs; ++v) {
#pragma GCC unroll 4
                for (int j = 0; j < Codes::kPairs; ++j) {
                    _mm512_storeu_si512(to + j * kTileCols + v * kLanes,
                                        codes.pair(from + v * kLanes, j));
                }
            }
            prefetch<kTileVecs>(from + kStepsAhead * step);
            from += step;
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
