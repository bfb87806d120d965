// One row of bf16 to int8 codes, with the bits of pymllm_core.nn.quant_ops: the same operations
// in the same order, rounding half to even.
#pragma once

#include <cmath>

#include "vec.h"

namespace pymllm {

// x = (code - zero_point) * scale. sum: of all codes.
struct RowCodes {
    float scale;
    int32_t zero_point;
    int32_t sum;
};

// The largest |x| of a row. The bits of a float without its sign grow with its size, and those of
// NaN are the largest, so a NaN is found where there is one.
inline float abs_max(const bf16* x, int64_t n) {
    __m512i best = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 mask = n - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - i)) - 1;
        best = _mm512_max_epu16(best, _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, x + i),
                                                       _mm512_set1_epi16(0x7FFF)));
    }
    const __m512i high = _mm512_srli_epi32(best, 16);
    const __m512i low = _mm512_and_si512(best, _mm512_set1_epi32(0xFFFF));
    const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(high, low)) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// codes[i] = clamp(round(f(x[i])) + zero_point); returns their sum. codes may be x: each step
// writes no further than it has read.
template <typename F>
int32_t write_codes(const bf16* x, int64_t n, float zero_point, int8_t* codes, F f) {
    const __m512 zero = _mm512_set1_ps(zero_point);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = first_lanes(n - i);
        __m512 v = _mm512_roundscale_ps(f(load_bf16(x + i, mask)), 0);
        v = _mm512_add_ps(v, zero);
        v = _mm512_max_ps(_mm512_set1_ps(-128.0f), _mm512_min_ps(_mm512_set1_ps(127.0f), v));
        const __m512i code = _mm512_cvtps_epi32(v);
        sum = _mm512_mask_add_epi32(sum, mask, sum, code);
        _mm_mask_storeu_epi8(codes + i, mask, _mm512_cvtepi32_epi8(code));
    }
    return _mm512_reduce_add_epi32(sum);
}

// quantize_per_token_int8
inline RowCodes quantize_symmetric(const bf16* x, int64_t n, int8_t* codes) {
    const float most = abs_max(x, n);
    // torch divides a number by a tensor as reciprocal and product.
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 1.0f / most * 127.0f : 0.0f);
    const int32_t sum =
        write_codes(x, n, 0.0f, codes, [&](__m512 v) { return _mm512_mul_ps(v, inverse); });
    return {most / 127.0f, 0, sum};
}

// quantize_static_int8
inline RowCodes quantize_static(const bf16* x, int64_t n, float scale, int32_t zero_point,
                                int8_t* codes) {
    const __m512 divisor = _mm512_set1_ps(scale);
    const int32_t sum = write_codes(x, n, static_cast<float>(zero_point), codes,
                                    [&](__m512 v) { return _mm512_div_ps(v, divisor); });
    return {scale, zero_point, sum};
}

// quantize_per_token_int8_asym
inline RowCodes quantize_asymmetric(const bf16* x, int64_t n, int8_t* codes) {
    __m512 least = _mm512_set1_ps(__builtin_inff()), most = _mm512_set1_ps(-__builtin_inff());
    __mmask16 nan = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        const __mmask16 mask = first_lanes(n - i);
        const __m512 v = load_bf16(x + i, mask);
        least = _mm512_mask_min_ps(least, mask, least, v);
        most = _mm512_mask_max_ps(most, mask, most, v);
        nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    }
    const float low = _mm512_reduce_min_ps(least), high = _mm512_reduce_max_ps(most);
    if (nan != 0) {
        std::memset(codes, 0, n);
        return {__builtin_nanf(""), 0, 0};
    }
    const bool flat = high <= low;
    const float scale = flat ? std::fabs(high) / 127.0f : (high - low) / 255.0f;
    const float divisor = scale > 0 ? scale : 1.0f;
    const float zero_point = flat ? 0.0f : std::nearbyint(-128.0f - low / divisor);
    const __m512 by = _mm512_set1_ps(divisor);
    const int32_t sum =
        write_codes(x, n, zero_point, codes, [&](__m512 v) { return _mm512_div_ps(v, by); });
    return {scale, static_cast<int32_t>(zero_point), sum};
}

}  // namespace pymllm
