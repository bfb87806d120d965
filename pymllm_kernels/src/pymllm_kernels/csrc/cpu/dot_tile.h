// The register tile all matrix products are made of.
//
// acc[m][v] += sum over steps p of A[m][p] . B[p][v], one chain per output in increasing p: of
// vdpbf16ps for pairs of bf16, of vpdpbusd for quadruples of 8-bit integers, as the type of the
// accumulator says. The chain is the same whatever the tile size, so a row of the result has the
// same bits in a GEMV, a small batch and a large GEMM; that is why nothing here may split a
// chain of floats over several accumulators.
#pragma once

#include "vec.h"

namespace pymllm {

// A: one dword (consecutive values along the reduction) per row and step, at a[m*a_row + p*a_step].
// B: vectors of 16 columns of dwords; two neighbours, then the next two `b_far` dwords on:
//    vector v of step p at b + v/2*b_far + v%2*16 + p*b_step.
// AHEAD > 0 prefetches B that many bytes ahead of its use.
template <int MR, int NV, int AHEAD, typename Acc>
inline __attribute__((always_inline)) void dot_tile(const uint32_t* a, int64_t a_row,
                                                    int64_t a_step, const uint32_t* b,
                                                    int64_t b_far, int64_t b_step,
                                                    int64_t steps, Acc (&acc)[MR][NV]) {
#pragma GCC unroll 2
    for (int64_t p = 0; p < steps; ++p) {
        __m512i column[NV];
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
            const uint32_t* at = b + v / 2 * b_far + v % 2 * kLanes;
            column[v] = _mm512_loadu_si512(at);
            if constexpr (AHEAD > 0) {
                _mm_prefetch(reinterpret_cast<const char*>(at) + AHEAD, _MM_HINT_T0);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
            const __m512i row = _mm512_set1_epi32(static_cast<int>(a[m * a_row]));
#pragma GCC unroll 16
            for (int v = 0; v < NV; ++v) acc[m][v] = dot(acc[m][v], row, column[v]);
        }
        a += a_step;
        b += b_step;
    }
}

}  // namespace pymllm
