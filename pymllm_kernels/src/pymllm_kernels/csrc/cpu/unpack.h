// Integer codes of weights to pairs of bf16, exactly. linear_pack.cpp writes what is read here.
#pragma once

#include "linear.h"

namespace pymllm {

// A dword holds 8 codes of 4 bits of one column, offset by 8: in its low word those of k, k+2, k+4,
// k+6, in its high word those of k+1, k+3, k+5, k+7, lowest bits first.
struct Int4Codes {
    static constexpr int kPairs = 4;  // in a dword

    // bf16 of u - 8 for u = 0 .. 15, twice: vpermw looks at 5 bits, of which the upper one belongs
    // to the next code.
    __m512i table = _mm512_set_epi16(
        0x40E0, 0x40C0, 0x40A0, 0x4080, 0x4040, 0x4000, 0x3F80, 0, -0x4080, -0x4000, -0x3FC0,
        -0x3F80, -0x3F60, -0x3F40, -0x3F20, -0x3F00, 0x40E0, 0x40C0, 0x40A0, 0x4080, 0x4040, 0x4000,
        0x3F80, 0, -0x4080, -0x4000, -0x3FC0, -0x3F80, -0x3F60, -0x3F40, -0x3F20, -0x3F00);

    // Pair j of each of 16 columns.
    __m512i pair(const uint32_t* at, int j) const {
        const __m512i codes = _mm512_loadu_si512(at);
        return _mm512_permutexvar_epi16(j == 0 ? codes : _mm512_srli_epi16(codes, 4 * j), table);
    }
};

// 16 dwords hold 4 codes of 8 bits of 16 columns: first the pair (k, k+1) of each column, then the
// pair (k+2, k+3).
struct Int8Codes {
    static constexpr int kPairs = 2;

    __m512i pair(const uint32_t* at, int j) const {
        const auto* bytes = reinterpret_cast<const __m128i*>(at) + 2 * j;
        auto wide = [&](int i) {
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes + i)));
        };
        const __m512bh pairs = _mm512_cvtne2ps_pbh(wide(1), wide(0));
        __m512i out;
        std::memcpy(&out, &pairs, sizeof(out));
        return out;
    }
};

}  // namespace pymllm
