// The linear layer of bf16 weights.
#include "linear_run.h"

namespace pymllm {
namespace {

struct Bf16 {
    using Sum = float;
    struct Note {};
    static constexpr int64_t notes = 0;
    // Reduction block: 32 columns x 512 pairs x 4 B = 64 KB of weights stay in the 1 MB L2 while
    // every row tile (12 x 512 x 4 B = 24 KB of x) passes over them. From L2 a step needs
    // 128 + 48 B for 12 cycles of arithmetic, far below what L2 delivers, so a longer block costs
    // nothing and spares the spills of a block small enough for L1 (measured: 128 pairs are 7 %
    // slower).
    static constexpr int64_t block_dwords = 512;
    const PackedLinear& packed;
    int64_t panel_dwords;

    static int64_t row_bytes(int64_t k) { return 2 * k; }
    static const void* prepare(const bf16* x, bf16*, int64_t, Note*) { return x; }

    static int few_tiles(int rows) { return rows == 1 ? kOneRowTiles : 1; }

    void few(int rows, int tiles, const uint32_t* panel, const Note*, int64_t t, float* sums) const {
        multiply_few(rows, tiles, panel, packed, t, sums);
    }

    void multiply(bool first, int rows, const uint32_t* panel, const Note*, int64_t t, int64_t d0,
                  int64_t steps, float* sums) const {
        (first ? kFirstPass<float> : kLaterPass<float>)[rows - 1](panel, packed.at(t, d0), 0,
                                                                  steps, sums, 0, d0 == 0);
    }

    void finish(const float* sums, const Note*, int64_t, __m512 (&y)[kTileVecs]) const {
        for (int v = 0; v < kTileVecs; ++v) y[v] = _mm512_loadu_ps(sums + v * kLanes);
    }
};

}  // namespace
}  // namespace pymllm

// Arguments as in LinearCall.
extern "C" void pymllm_linear(const pymllm::PackedLinear* packed, const pymllm::bf16* x,
                              int64_t ldx, int64_t m, int64_t k, const pymllm::bf16* norm,
                              float eps, const pymllm::bf16* residual, int64_t ldr, void* out,
                              int out_f32, int threads) {
    using namespace pymllm;
    const LinearCall call{x, ldx, m, k, norm, eps, residual, ldr, out, out_f32 != 0};
    run_linear(Bf16{*packed, packed->dwords}, call, threads);
}
