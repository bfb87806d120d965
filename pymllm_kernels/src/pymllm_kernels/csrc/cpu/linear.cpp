// y = act(rms_norm(x) W^T + bias) + residual over a packed weight.
#include "linear.h"

#include <algorithm>

#include "dot_tile.h"
#include "rms_norm.h"
#include "scratch.h"
#include "team.h"
#include "transpose.h"

namespace pymllm {
namespace {

// Reduction block: 32 columns x 512 pairs x 4 B = 64 KB of weights stay in the 1 MB L2 while every
// row tile (12 x 512 x 4 B = 24 KB of x) passes over them. From L2 a step needs 128 + 48 B for 12
// cycles of arithmetic, far below what L2 delivers, so a longer block costs nothing and spares
// the spills of a block small enough for L1 (measured: 128 pairs are 7 % slower).
constexpr int64_t kBlockPairs = 512;
// Rows handled per pass: their x block (768 x 1024 x 2 B = 1.5 MB) streams from L2 and L3, their
// fp32 sums (768 x 32 x 4 B = 96 KB) stay in L2.
constexpr int64_t kMaxRows = 64 * kRowTile;
// Neighbouring weight tiles taken together by the single-row product: 4 x 2 chains hide the
// latency of vdpbf16ps, and the four streams are read at memory speed.
constexpr int kGemvTiles = 4;
// Bytes by which the weight stream is prefetched ahead of its use, where several rows share it:
// 8 KB cover 200 ns of memory latency at 40 GB/s, more than the out-of-order window does with
// 8 rows of arithmetic between two loads. A single row is limited by memory alone and the
// hardware prefetchers do better without help.
constexpr int kAhead = 8192;

struct Call {
    const PackedLinear* packed;
    const bf16* x;
    int64_t ldx;
    const bf16* norm;
    float eps;
    const bf16* residual;
    int64_t ldr;
    void* out;
    bool out_f32;
};

// `rows` rows as tiles of at most 12 whose sizes differ by at most one: 13 rows are 7 + 6,
// not 12 + 1.
struct RowTiles {
    int64_t rows;
    int64_t count;
    explicit RowTiles(int64_t n) : rows(n), count((n + kRowTile - 1) / kRowTile) {}
    int64_t begin(int64_t i) const { return rows * i / count; }
    int size(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
};

// Adds the product of MR rows and NT neighbouring weight tiles over `pairs` steps to `sums`
// (to zero when `fresh`). Tile j has its sums at sums + j * tile_sums, [MR][32].
template <int MR, int NT, int AHEAD>
void multiply(const uint32_t* a, const uint32_t* w, int64_t tile_stride, int64_t pairs,
              float* sums, int64_t tile_sums, bool fresh) {
    constexpr int kVecs = NT * kTileVecs;
    auto at = [&](int m, int v) {
        return sums + v / kTileVecs * tile_sums + m * kTileCols + v % kTileVecs * kLanes;
    };
    __m512 acc[MR][kVecs];
    if (fresh) {
        for (int m = 0; m < MR; ++m) {
            for (int v = 0; v < kVecs; ++v) acc[m][v] = _mm512_setzero_ps();
        }
    } else {
        for (int m = 0; m < MR; ++m) {
            for (int v = 0; v < kVecs; ++v) acc[m][v] = _mm512_loadu_ps(at(m, v));
        }
    }
    dot_tile<MR, kVecs, AHEAD>(a, 1, MR, w, tile_stride, kTileCols, pairs, acc);
    for (int m = 0; m < MR; ++m) {
        for (int v = 0; v < kVecs; ++v) _mm512_storeu_ps(at(m, v), acc[m][v]);
    }
}

using Multiply = void (*)(const uint32_t*, const uint32_t*, int64_t, int64_t, float*, int64_t,
                          bool);

// By rows - 1; the first pass over a weight block prefetches, later ones find it in L1.
constexpr Multiply kFirstPass[kRowTile] = {
    multiply<1, 1, 0>, multiply<2, 1, kAhead>,  multiply<3, 1, kAhead>,
    multiply<4, 1, kAhead>, multiply<5, 1, kAhead>,  multiply<6, 1, kAhead>,
    multiply<7, 1, kAhead>, multiply<8, 1, kAhead>,  multiply<9, 1, kAhead>,
    multiply<10, 1, kAhead>, multiply<11, 1, kAhead>, multiply<12, 1, kAhead>};
constexpr Multiply kLaterPass[kRowTile] = {
    multiply<1, 1, 0>, multiply<2, 1, 0>, multiply<3, 1, 0>,  multiply<4, 1, 0>,
    multiply<5, 1, 0>, multiply<6, 1, 0>, multiply<7, 1, 0>,  multiply<8, 1, 0>,
    multiply<9, 1, 0>, multiply<10, 1, 0>, multiply<11, 1, 0>, multiply<12, 1, 0>};

// Normalises `rows` rows of x from `row0` and lays them out as [pairs][rows] dwords, zero
// padded where k is odd. `normed` holds rows * k values.
void pack_rows(const Call& call, int64_t row0, int rows, bf16* normed, uint32_t* panel) {
    const int64_t k = call.packed->k;
    const int64_t pairs = call.packed->pairs;
    const bf16* src = call.x + row0 * call.ldx;
    int64_t ld = call.ldx;
    if (call.norm != nullptr) {
        for (int m = 0; m < rows; ++m) {
            rms_norm_row(src + m * ld, call.norm, call.eps, k, normed + m * k);
        }
        src = normed;
        ld = k;
    }
    const __mmask16 mask = first_lanes(rows);
    for (int64_t p0 = 0; p0 < pairs; p0 += kLanes) {
        __m512i block[16];
        for (int m = 0; m < kLanes; ++m) {
            block[m] = m < rows ? load_pairs(src + m * ld, p0, k) : _mm512_setzero_si512();
        }
        transpose16(block);
        const int steps = static_cast<int>(std::min<int64_t>(kLanes, pairs - p0));
        for (int i = 0; i < steps; ++i) {
            _mm512_mask_storeu_epi32(panel + (p0 + i) * rows, mask, block[i]);
        }
    }
}

void write_columns(const Call& call, int64_t row, int64_t n0, __m512 v) {
    const int64_t n_out = call.packed->n_out;
    const __mmask16 mask = first_lanes(n_out - n0);
    if (mask == 0) return;
    if (call.residual != nullptr) {
        v = _mm512_add_ps(v, load_bf16(call.residual + row * call.ldr + n0, mask));
    }
    if (call.out_f32) {
        _mm512_mask_storeu_ps(static_cast<float*>(call.out) + row * n_out + n0, mask, v);
    } else {
        store_bf16(static_cast<bf16*>(call.out) + row * n_out + n0, v, mask);
    }
}

// Bias, activation, residual and the single rounding for one row of tile `t`.
void finish_row(const Call& call, int64_t row, int64_t t, const float* sums) {
    const PackedLinear& w = *call.packed;
    __m512 lo = _mm512_loadu_ps(sums);
    __m512 hi = _mm512_loadu_ps(sums + kLanes);
    if (w.bias != nullptr) {
        lo = _mm512_add_ps(lo, _mm512_loadu_ps(w.bias + t * kTileCols));
        hi = _mm512_add_ps(hi, _mm512_loadu_ps(w.bias + t * kTileCols + kLanes));
    }
    if (w.act == kActSiluMul) {
        write_columns(call, row, t * kLanes, _mm512_mul_ps(silu_ps(lo), hi));
    } else {
        write_columns(call, row, t * kTileCols, lo);
        write_columns(call, row, t * kTileCols + kLanes, hi);
    }
}

// Up to 12 rows: every thread prepares x for itself (cheaper than a barrier) and streams its
// share of the weight once.
void few_rows(const Call& call, int rows, Range tiles) {
    const PackedLinear& w = *call.packed;
    const int64_t tile_size = w.pairs * kTileCols;
    thread_local Scratch panel_scratch, normed_scratch;
    const uint32_t* panel;
    if (rows == 1 && call.norm == nullptr && w.k % 2 == 0) {
        panel = reinterpret_cast<const uint32_t*>(call.x);
    } else {
        auto* packed = panel_scratch.get<uint32_t>(rows * w.pairs * sizeof(uint32_t));
        pack_rows(call, 0, rows, normed_scratch.get<bf16>(rows * w.k * sizeof(bf16)), packed);
        panel = packed;
    }
    alignas(64) float sums[kRowTile * kTileCols];
    int64_t t = tiles.begin;
    if (rows == 1) {
        for (; t + kGemvTiles <= tiles.end; t += kGemvTiles) {
            multiply<1, kGemvTiles, 0>(panel, w.weight + t * tile_size, tile_size, w.pairs,
                                            sums, kTileCols, true);
            for (int j = 0; j < kGemvTiles; ++j) finish_row(call, 0, t + j, sums + j * kTileCols);
        }
    }
    for (; t < tiles.end; ++t) {
        kFirstPass[rows - 1](panel, w.weight + t * tile_size, 0, w.pairs, sums, 0, true);
        for (int m = 0; m < rows; ++m) finish_row(call, m, t, sums + m * kTileCols);
    }
}

// Requests the lines of the result that rows [begin, end) of tile `t` will write: the rows lie far
// apart, and without this each store would wait for its line.
void prefetch_result(const Call& call, int64_t begin, int64_t end, int64_t t) {
    const PackedLinear& w = *call.packed;
    const int64_t width = call.out_f32 ? sizeof(float) : sizeof(bf16);
    const int64_t columns = w.act == kActSiluMul ? kLanes : kTileCols;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * w.n_out + t * columns;
        __builtin_prefetch(static_cast<char*>(call.out) + at * width, 1);
        if (call.residual != nullptr) {
            __builtin_prefetch(call.residual + row * call.ldr + t * columns);
        }
    }
}

// One weight tile against `rows.rows` packed rows starting at row0 of the result.
void tile_against_rows(const Call& call, int64_t row0, const RowTiles& rows,
                       const uint32_t* panels, int64_t t, float* sums) {
    const PackedLinear& w = *call.packed;
    for (int64_t p0 = 0; p0 < w.pairs; p0 += kBlockPairs) {
        const int64_t steps = std::min(kBlockPairs, w.pairs - p0);
        const bool last = p0 + steps == w.pairs;
        const uint32_t* block = w.weight + (t * w.pairs + p0) * kTileCols;
        for (int64_t i = 0; i < rows.count; ++i) {
            const int64_t begin = rows.begin(i), end = rows.begin(i + 1);
            const int64_t size = end - begin;
            const uint32_t* panel = panels + begin * w.pairs + p0 * size;
            if (last) prefetch_result(call, row0 + begin, row0 + end, t);
            (i == 0 ? kFirstPass : kLaterPass)[size - 1](
                panel, block, 0, steps, sums + begin * kTileCols, 0, p0 == 0);
            for (int64_t m = begin; last && m < end; ++m) {
                finish_row(call, row0 + m, t, sums + m * kTileCols);
            }
        }
    }
}

}  // namespace
}  // namespace pymllm

// x: [m][k] bf16, rows ldx apart. norm: [k] bf16 or null. residual: [m][n_out] bf16, rows ldr
// apart, or null. out: [m][n_out] contiguous, bf16 or fp32; it must not overlap an input.
extern "C" void pymllm_linear(const pymllm::PackedLinear* packed, const pymllm::bf16* x,
                              int64_t ldx, int64_t m, const pymllm::bf16* norm, float eps,
                              const pymllm::bf16* residual, int64_t ldr, void* out, int out_f32,
                              int threads) {
    using namespace pymllm;
    const Call call{packed, x, ldx, norm, eps, residual, ldr, out, out_f32 != 0};
    if (m <= 0) return;
    if (m <= kRowTile) {
        auto body = [&](int rank, int size) {
            few_rows(call, static_cast<int>(m), share(packed->tiles, rank, size));
        };
        parallel(threads, body);
        return;
    }
    const int64_t passes = (m + kMaxRows - 1) / kMaxRows;
    const int64_t pass_rows = (m + passes - 1) / passes;
    thread_local Scratch panel_scratch;
    auto* panels = panel_scratch.get<uint32_t>(pass_rows * packed->pairs * sizeof(uint32_t));
    auto body = [&](int rank, int size) {
        thread_local Scratch sums_scratch, normed_scratch;
        auto* sums = sums_scratch.get<float>(pass_rows * kTileCols * sizeof(float));
        auto* normed = normed_scratch.get<bf16>(kRowTile * packed->k * sizeof(bf16));
        for (int64_t pass = 0; pass < passes; ++pass) {
            const int64_t row0 = m * pass / passes;
            const RowTiles rows(m * (pass + 1) / passes - row0);
            const Range pack = share(rows.count, rank, size);
            for (int64_t i = pack.begin; i < pack.end; ++i) {
                const int64_t begin = rows.begin(i);
                pack_rows(call, row0 + begin, rows.size(i), normed,
                          panels + begin * packed->pairs);
            }
            barrier(size);
            const Range mine = share(packed->tiles, rank, size);
            for (int64_t t = mine.begin; t < mine.end; ++t) {
                tile_against_rows(call, row0, rows, panels, t, sums);
            }
            barrier(size);  // the next pass overwrites the panels
        }
    };
    parallel(threads, body);
}
