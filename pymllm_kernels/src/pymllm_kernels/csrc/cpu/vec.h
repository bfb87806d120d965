// bf16 <-> fp32 vectors of 16 and the few transcendental functions the kernels need.
//
// Everything here is per lane and free of compiler-chosen contraction (-ffp-contract=off), so
// one input value gives the same bits wherever it stands: the batch invariance of the
// kernels rests on that.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pymllm {

using bf16 = uint16_t;
constexpr int kLanes = 16;  // fp32 values in one zmm register

// A vector of int32. Arrays of __m512i, a vector of int64, are not kept in registers by GCC 12
// where instructions on int32 use them.
using i32x16 = int32_t __attribute__((vector_size(64)));

// A mask of the first `count` lanes (count may exceed 16 or be negative).
inline __mmask16 first_lanes(int64_t count) {
    if (count >= kLanes) return 0xFFFF;
    if (count <= 0) return 0;
    return static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

inline __m512 load_bf16(const bf16* p, __mmask16 mask) {
    return widen(_mm256_maskz_loadu_epi16(mask, p));
}

// Round to nearest even.
inline __m256i narrow(__m512 v) {
    const __m256bh r = _mm512_cvtneps_pbh(v);
    __m256i out;
    std::memcpy(&out, &r, sizeof(out));
    return out;
}

inline void store_bf16(bf16* p, __m512 v, __mmask16 mask) {
    _mm256_mask_storeu_epi16(p, mask, narrow(v));
}

// acc + a0*b0 + a1*b1 for 16 pairs of bf16 (vdpbf16ps).
inline __m512 dot(__m512 acc, __m512i a, __m512i b) {
    __m512bh x, y;
    std::memcpy(&x, &a, sizeof(x));
    std::memcpy(&y, &b, sizeof(y));
    return _mm512_dpbf16_ps(acc, x, y);
}

// acc + a0*b0 + ... + a3*b3 for 16 quadruples of int8 `a` and uint8 `b` (vpdpbusd), modulo 2^32.
inline i32x16 dot(i32x16 acc, __m512i a, __m512i b) {
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, b, a);
}

// e^x, relative error < 2e-7 for x in [-87, 88]; 0 below -87.3 (-inf included), inf above
// 88.7; NaN stays NaN. e^x = 2^n * e^r with n = round(x / ln 2), |r| <= ln 2 / 2, and e^r by
// its degree-6 minimax polynomial.
inline __m512 exp_ps(__m512 x) {
    const __mmask16 underflow = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3365f), _CMP_LT_OQ);
    // max/min return their second operand when one is NaN, so NaN passes through.
    x = _mm512_max_ps(_mm512_set1_ps(-88.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504089f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.3981999507e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_mask_mov_ps(_mm512_scalef_ps(p, n), underflow, _mm512_setzero_ps());
}

inline float exp_scalar(float x) { return _mm512_cvtss_f32(exp_ps(_mm512_set1_ps(x))); }

// x * sigmoid(x)
inline __m512 silu_ps(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(one, e));
}

}  // namespace pymllm
