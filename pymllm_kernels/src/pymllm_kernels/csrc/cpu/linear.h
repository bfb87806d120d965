// The packed weight of one linear layer and the sizes shared by packing and multiplying.
#pragma once

#include "vec.h"

namespace pymllm {

// Weight tile: 32 output columns = 2 zmm vectors of bf16 pairs. A register tile of 12 rows x 2
// vectors uses 24 accumulators + 2 weight vectors + 1 broadcast = 27 of 32 zmm registers; per
// step it loads 2 + 12 operands for 24 vdpbf16ps, i.e. 7 load cycles under 12 arithmetic ones.
constexpr int kTileVecs = 2;
constexpr int kTileCols = kTileVecs * kLanes;
constexpr int kRowTile = 12;

enum Act : int64_t { kActNone = 0, kActSiluMul = 1 };

// Mirrored by a ctypes.Structure in Python: all fields are 8 bytes wide.
// weight: [tiles][pairs][32] dwords, each a pair (W[n][2p], W[n][2p+1]) of bf16, zero padded.
// With kActSiluMul a tile holds 16 gate rows and their 16 up rows, so that both operands of
// silu(gate) * up end in one thread's registers.
// bias: [tiles][32] fp32 in the same column order, or null.
struct PackedLinear {
    const uint32_t* weight;
    const float* bias;
    int64_t n_out;  // columns of the result (N, or N / 2 with kActSiluMul)
    int64_t k;      // columns of x
    int64_t pairs;  // (k + 1) / 2
    int64_t tiles;
    int64_t act;
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
