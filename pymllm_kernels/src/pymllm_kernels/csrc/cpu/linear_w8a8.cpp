// The linear layer of int8 weights and int8 activations: operation w8a8_linear.
#include "linear_run.h"
#include "quantize.h"

namespace pymllm {
namespace {

// Mirrored in Python. weight_scale: [tiles][32]. weight_sum: [tiles][32], the sums of the codes
// of each column, for asymmetric activations, else null.
struct PackedW8A8 {
    PackedLinear linear;
    const float* weight_scale;
    const int32_t* weight_sum;
    int64_t is_static;  // whether all rows have input_scale and input_zero_point
    double input_scale;
    int64_t input_zero_point;
};

// The product minus zero_point * sum, exact in 64 bits, rounded to float once.
inline __m512 minus_zero_point(__m512i product, __m512i zero_point, __m512i sum) {
    __m256 halves[2];
    for (int h = 0; h < 2; ++h) {
        const auto half = [&](__m512i v) {
            return h == 0 ? _mm512_castsi512_si256(v) : _mm512_extracti64x4_epi64(v, 1);
        };
        const __m512i shift = _mm512_mullo_epi64(_mm512_cvtepi32_epi64(half(zero_point)),
                                                 _mm512_cvtepi32_epi64(half(sum)));
        halves[h] =
            _mm512_cvtepi64_ps(_mm512_sub_epi64(_mm512_cvtepi32_epi64(half(product)), shift));
    }
    return _mm512_insertf32x8(_mm512_castps256_ps512(halves[0]), halves[1], 1);
}

// The weights are uint8, offset by 128, so 128 * (sum of x) is to be subtracted. K is at most
// 65,536: 65,536 * 255 * 128 is under 2^31.
struct W8A8 {
    using Sum = int32_t;
    using Note = RowCodes;
    static constexpr int64_t notes = 1;
    static constexpr int64_t block_dwords = 512;  // as for bf16
    const PackedW8A8& w8a8;
    const PackedLinear& packed;
    int64_t panel_dwords;

    explicit W8A8(const PackedW8A8& w)
        : w8a8(w), packed(w.linear), panel_dwords(w.linear.dwords) {}

    static int64_t row_bytes(int64_t k) { return k; }

    const void* prepare(const bf16* x, bf16* dst, int64_t k, Note* note) const {
        auto* codes = reinterpret_cast<int8_t*>(dst);
        if (w8a8.is_static) {
            *note = quantize_static(x, k, static_cast<float>(w8a8.input_scale),
                                    static_cast<int32_t>(w8a8.input_zero_point), codes);
        } else if (w8a8.weight_sum != nullptr) {
            *note = quantize_asymmetric(x, k, codes);
        } else {
            *note = quantize_symmetric(x, k, codes);
        }
        return codes;
    }

    static int few_tiles(int rows) { return rows == 1 ? kOneRowTiles : 1; }

    void few(int rows, int tiles, const uint32_t* panel, const Note*, int64_t t, int32_t* sums) const {
        multiply_few(rows, tiles, panel, packed, t, sums);
    }

    void multiply(bool first, int rows, const uint32_t* panel, const Note*, int64_t t, int64_t d0,
                  int64_t steps, int32_t* sums) const {
        (first ? kFirstPass<int32_t> : kLaterPass<int32_t>)[rows - 1](
            panel, packed.at(t, d0), 0, steps, sums, 0, d0 == 0);
    }

    // quant_ops.w8a8_epilogue
    void finish(const int32_t* sums, const Note* note, int64_t t, __m512 (&y)[kTileVecs]) const {
        const __m512i offset = _mm512_set1_epi32(static_cast<int32_t>(
            static_cast<uint32_t>(note->sum) * 128));
        const __m512 scale = _mm512_set1_ps(note->scale);
        for (int v = 0; v < kTileVecs; ++v) {
            const int64_t at = t * kTileCols + v * kLanes;
            const __m512i product =
                _mm512_sub_epi32(_mm512_loadu_si512(sums + v * kLanes), offset);
            const __m512 wide =
                w8a8.weight_sum == nullptr
                    ? _mm512_cvtepi32_ps(product)
                    : minus_zero_point(product, _mm512_set1_epi32(note->zero_point),
                                       _mm512_loadu_si512(w8a8.weight_sum + at));
            y[v] = _mm512_mul_ps(_mm512_mul_ps(wide, scale),
                                 _mm512_loadu_ps(w8a8.weight_scale + at));
        }
    }
};

}  // namespace
}  // namespace pymllm

// Arguments as in LinearCall.
extern "C" void pymllm_w8a8_linear(const void* packed, const pymllm::bf16* x, int64_t ldx,
                                   int64_t m, int64_t k, const pymllm::bf16* norm, float eps,
                                   const pymllm::bf16* residual, int64_t ldr, void* out,
                                   int out_f32, int threads) {
    using namespace pymllm;
    const LinearCall call{x, ldx, m, k, norm, eps, residual, ldr, out, out_f32 != 0};
    run_linear(W8A8(*static_cast<const PackedW8A8*>(packed)), call, threads);
}
