// 16x16 transpose of dwords, the unit in which rows of bf16 pairs become columns.
#pragma once

#include "vec.h"

namespace pymllm {

// r[i] lane j  ->  r[j] lane i
inline void transpose16(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // Now 128-bit lane L of t holds pairs of rows; join them into quadruples of rows.
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4q + c], lane L: rows 4q..4q+3 of column 4L + c. Gather the lanes across q.
    for (int c = 0; c < 4; ++c) {
        t[c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);           // L = 0, 2 of q = 0, 1
        t[4 + c] = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xDD);       // L = 1, 3
        t[8 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);  // of q = 2, 3
        t[12 + c] = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xDD);
    }
    for (int c = 0; c < 4; ++c) {
        r[c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0x88);
        r[8 + c] = _mm512_shuffle_i32x4(t[c], t[8 + c], 0xDD);
        r[4 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0x88);
        r[12 + c] = _mm512_shuffle_i32x4(t[4 + c], t[12 + c], 0xDD);
    }
}

// Dwords d0 .. d0+15 of one row of `bytes` bytes, zeros past its end.
inline __m512i load_dwords(const void* row, int64_t d0, int64_t bytes) {
    const int64_t left = bytes - 4 * d0;
    const char* at = static_cast<const char*>(row) + 4 * d0;
    if (left >= 64) return _mm512_loadu_si512(at);
    if (left <= 0) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi8((__mmask64{1} << left) - 1, at);
}

// Pairs p0 .. p0+15 of one row of `k` bf16 values, zeros past its end.
inline __m512i load_pairs(const bf16* row, int64_t p0, int64_t k) {
    return load_dwords(row, p0, 2 * k);
}

}  // namespace pymllm
