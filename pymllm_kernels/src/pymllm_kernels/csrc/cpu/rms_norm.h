// RMSNorm of one row of bf16, as transformers defines it for Qwen3 and Llama: statistics in
// fp32, x * rsqrt(mean(x^2) + eps) rounded to bf16, then times the weight in bf16.
#pragma once

#include <cmath>

#include "vec.h"

namespace pymllm {

// `weight` may be null (all ones). `out` may be `x`.
inline void rms_norm_row(const bf16* x, const bf16* weight, float eps, int64_t n, bf16* out) {
    __m512 squares[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += 2 * kLanes) {
        for (int j = 0; j < 2; ++j) {
            const __m512 v = load_bf16(x + i + j * kLanes, first_lanes(n - i - j * kLanes));
            squares[j] = _mm512_fmadd_ps(v, v, squares[j]);
        }
    }
    const float sum = _mm512_reduce_add_ps(_mm512_add_ps(squares[0], squares[1]));
    const __m512 scale =
        _mm512_set1_ps(1.0f / std::sqrt(sum / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = first_lanes(n - i);
        __m512 v = widen(narrow(_mm512_mul_ps(load_bf16(x + i, mask), scale)));
        if (weight != nullptr) v = _mm512_mul_ps(v, load_bf16(weight + i, mask));
        store_bf16(out + i, v, mask);
    }
}

}  // namespace pymllm
