// The packed weight of one linear layer, one call of it, and the sizes shared by packing and
// multiplying.
#pragma once

#include <algorithm>

#include "vec.h"

namespace pymllm {

// Weight tile: 32 output columns = 2 zmm vectors of dwords. A register tile of 12 rows x 2
// vectors uses 24 accumulators + 2 weight vectors + 1 broadcast = 27 of 32 zmm registers; per
// step it loads 2 + 12 operands for 24 dot instructions, i.e. 7 load cycles under 12 arithmetic
// ones.
constexpr int kTileVecs = 2;
constexpr int kTileCols = kTileVecs * kLanes;
constexpr int kRowTile = 12;

enum Act : int64_t { kActNone = 0, kActSiluMul = 1 };

// Mirrored by a ctypes.Structure in Python: all fields are 8 bytes wide.
// weight: [tiles][dwords][32] dwords of consecutive k of one column, zero padded; linear_pack.h
// says what a dword holds. With a span of 4 the tiles stand in fours, the last in what is left of
// them, whose dwords alternate: [dwords][4][32]. With kActSiluMul a tile holds 16 gate rows and their 16 up rows, so
// that both operands of silu(gate) * up end in one thread's registers.
// bias: [tiles][32] fp32 in the same column order, or null.
struct PackedLinear {
    const uint32_t* weight;
    const float* bias;
    int64_t n_out;   // columns of the result (N, or N / 2 with kActSiluMul)
    int64_t dwords;  // of one column
    int64_t tiles;
    int64_t act;
    int64_t span;

    // From one dword of a column of tile `t` to the next.
    int64_t step(int64_t t) const {
        return std::min(span, tiles - t / span * span) * kTileCols;
    }
    const uint32_t* at(int64_t t, int64_t dword) const {
        const int64_t first = t / span * span;
        return weight + (first * dwords + t - first) * kTileCols + dword * step(t);
    }
};

// x: [m][k] bf16, rows ldx apart. norm: [k] bf16 or null. residual: [m][n_out] bf16, rows ldr
// apart, or null. out: [m][n_out] contiguous, bf16 or fp32; it must not overlap an input.
struct LinearCall {
    const bf16* x;
    int64_t ldx;
    int64_t m;
    int64_t k;
    const bf16* norm;
    float eps;
    const bf16* residual;
    int64_t ldr;
    void* out;
    bool out_f32;
};

// The weight row stored in column `c` of tile `t`, or -1 for padding.
inline int64_t source_row(int64_t act, int64_t n_out, int64_t t, int c) {
    if (act == kActSiluMul) {
        const int64_t i = t * kLanes + c % kLanes;
        return i < n_out ? (c < kLanes ? i : n_out + i) : -1;
    }
    const int64_t n = t * kTileCols + c;
    return n < n_out ? n : -1;
}

}  // namespace pymllm
