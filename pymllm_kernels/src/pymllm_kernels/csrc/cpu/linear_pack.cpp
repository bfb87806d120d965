// Packing a row-major bf16 weight into tiles (see linear.h). Runs once per layer, in parallel.
#include "linear.h"
#include "team.h"
#include "transpose.h"

namespace pymllm {
namespace {

void pack_tile(const bf16* src, int64_t ld, int64_t n_out, int64_t k, int64_t act, int64_t t,
               uint32_t* dst) {
    const int64_t pairs = (k + 1) / 2;
    for (int half = 0; half < kTileVecs; ++half) {
        for (int64_t p0 = 0; p0 < pairs; p0 += kLanes) {
            __m512i block[16];
            for (int i = 0; i < kLanes; ++i) {
                const int64_t row = source_row(act, n_out, t, half * kLanes + i);
                block[i] = row < 0 ? _mm512_setzero_si512() : load_pairs(src + row * ld, p0, k);
            }
            transpose16(block);
            for (int i = 0; i < kLanes && p0 + i < pairs; ++i) {
                _mm512_storeu_si512(dst + (p0 + i) * kTileCols + half * kLanes, block[i]);
            }
        }
    }
}

}  // namespace
}  // namespace pymllm

// src: [n_out or 2 * n_out][k] bf16, rows `ld` elements apart. dst: [tiles][pairs][32] dwords.
extern "C" void pymllm_linear_pack(const pymllm::bf16* src, int64_t ld, int64_t n_out, int64_t k,
                                   int64_t act, int64_t tiles, uint32_t* dst, int threads) {
    using namespace pymllm;
    const int64_t tile_size = (k + 1) / 2 * kTileCols;
    auto body = [&](int rank, int size) {
        const Range mine = share(tiles, rank, size);
        for (int64_t t = mine.begin; t < mine.end; ++t) {
            pack_tile(src, ld, n_out, k, act, t, dst + t * tile_size);
        }
    };
    parallel(threads, body);
}
