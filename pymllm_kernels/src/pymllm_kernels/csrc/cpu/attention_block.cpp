// One tile of query rows against one block of keys (see attention.h).
#include <algorithm>
#include <limits>

#include "attention.h"
#include "attention_pack.h"
#include "dot_tile.h"

namespace pymllm {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int kGroupVecs = kGroup / kLanes;
constexpr int kRowStep = 6;  // 6 rows x 4 vectors = 24 accumulators

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Addresses of the keys [key0, key0 + keys) of the tile's first kv head in `cache`; the list is
// filled up to a whole group with its last row, for the prefetches to point somewhere.
void find_rows(const AttentionCall& call, const RowTile& tile, const bf16* cache, int64_t key0,
               int64_t keys, const bf16** rows) {
    const int32_t* pages = call.page_table + tile.seq * call.max_pages;
    const int64_t slot_size = call.kv_heads * call.dim;
    int64_t offset = key0 % call.page_size;
    int64_t page = key0 / call.page_size;
    for (int64_t j = 0; j < keys; ++page, offset = 0) {
        const bf16* row = cache + (pages[page] * call.page_size + offset) * slot_size +
                          tile.kv_head * call.dim;
        const int64_t end = std::min(keys, j + call.page_size - offset);
        for (; j < end; ++j, row += slot_size) rows[j] = row;
    }
    std::fill(rows + keys, rows + round_up(keys, kGroup), rows[keys - 1]);
}

// c[MR][64] (rows ldc apart) = A . B for one packed group, added to c unless `fresh`.
template <int MR>
void product(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t pairs, float* c,
             int64_t ldc, bool fresh) {
    __m512 acc[MR][kGroupVecs];
    if (fresh) {
        for (int m = 0; m < MR; ++m) {
            for (int v = 0; v < kGroupVecs; ++v) acc[m][v] = _mm512_setzero_ps();
        }
    } else {
        for (int m = 0; m < MR; ++m) {
            for (int v = 0; v < kGroupVecs; ++v) {
                acc[m][v] = _mm512_loadu_ps(c + m * ldc + v * kLanes);
            }
        }
    }
    dot_tile<MR, kGroupVecs, 0>(a, lda, 1, b, 2 * kLanes, kGroup, pairs, acc);
    for (int m = 0; m < MR; ++m) {
        for (int v = 0; v < kGroupVecs; ++v) _mm512_storeu_ps(c + m * ldc + v * kLanes, acc[m][v]);
    }
}

void product_rows(const uint32_t* a, int64_t lda, int64_t rows, const uint32_t* b,
                  int64_t pairs, float* c, int64_t ldc, bool fresh) {
    int64_t m = 0;
    for (; m + kRowStep <= rows; m += kRowStep) {
        product<kRowStep>(a + m * lda, lda, b, pairs, c + m * ldc, ldc, fresh);
    }
    a += m * lda;
    c += m * ldc;
    switch (rows - m) {
        case 1: return product<1>(a, lda, b, pairs, c, ldc, fresh);
        case 2: return product<2>(a, lda, b, pairs, c, ldc, fresh);
        case 3: return product<3>(a, lda, b, pairs, c, ldc, fresh);
        case 4: return product<4>(a, lda, b, pairs, c, ldc, fresh);
        case 5: return product<5>(a, lda, b, pairs, c, ldc, fresh);
        default: return;
    }
}

// Scores of one row -> probabilities rounded to bf16 (`p`, zeros for masked keys), maximum and
// sum. The first `visible` of `keys` keys count; `visible` may be <= 0.
void softmax_row(const float* scores, int64_t visible, int64_t keys, float scale, bf16* p,
                 float* max_out, float* sum_out) {
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 top = _mm512_set1_ps(kMinusInf);
    for (int64_t j = 0; j < visible; j += kLanes) {
        const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + j), factor);
        top = _mm512_mask_max_ps(top, first_lanes(visible - j), s, top);
    }
    const float max = _mm512_reduce_max_ps(top);
    const __m512 base = _mm512_set1_ps(max);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < keys; j += kLanes) {
        const __mmask16 mask = first_lanes(visible - j);
        const __m512 s = _mm512_mul_ps(_mm512_loadu_ps(scores + j), factor);
        const __m512 e = _mm512_maskz_mov_ps(mask, exp_ps(_mm512_sub_ps(s, base)));
        // The sum is taken over the rounded values, so that the weights of V add up to one.
        const __m256i rounded = narrow(e);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + j), rounded);
        sum = _mm512_add_ps(sum, widen(rounded));
    }
    *max_out = max;
    *sum_out = _mm512_reduce_add_ps(sum);
}

// Scale of a partial result whose maximum is `max` when the common maximum is `top`.
float rescale(float max, float top) { return max == kMinusInf ? 0.0f : exp_scalar(max - top); }

}  // namespace

int64_t AttentionBuffers::bytes(int64_t dim, int64_t padded_dim) {
    return kMaxTileRows * (dim / 2 + kScoreStride + kKeyBlock / 2) * 4 +
           kGroup / 2 * padded_dim * 4 +
           kRowList * static_cast<int64_t>(sizeof(void*)) + 6 * 64;
}

AttentionBuffers AttentionBuffers::at(char* memory, int64_t dim, int64_t padded_dim) {
    auto take = [&memory](int64_t bytes) {
        char* p = memory;
        memory += round_up(bytes, 64);
        return static_cast<void*>(p);
    };
    AttentionBuffers b;
    b.q = static_cast<uint32_t*>(take(kMaxTileRows * (dim / 2) * 4));
    b.packed = static_cast<uint32_t*>(take(kGroup / 2 * padded_dim * 4));
    b.scores = static_cast<float*>(take(kMaxTileRows * kScoreStride * 4));
    b.p = static_cast<uint32_t*>(take(kMaxTileRows * kKeyBlock / 2 * 4));
    b.rows = static_cast<const bf16**>(take(kRowList * sizeof(void*)));
    return b;
}

void gather_queries(const AttentionCall& call, const RowTile& tile, AttentionBuffers& buffers) {
    for (int64_t r = 0; r < tile.all_rows(); ++r) {
        std::memcpy(buffers.q + r * (call.dim / 2), call.q + RowPlace(call, tile, r).offset(call),
                    call.dim * sizeof(bf16));
    }
}

void attend_block(const AttentionCall& call, const RowTile& tile, int64_t block,
                  AttentionBuffers& buffers, const RowSums& out) {
    const int64_t dim = call.dim, padded_dim = call.padded_dim();
    const int64_t key0 = block * kKeyBlock;
    const int64_t keys = std::min(kKeyBlock, tile.keys - key0);
    const int64_t pairs = dim / 2;
    // Everything in the order of use: keys, values, and the first keys of the next block.
    const bf16** key_rows = buffers.rows;
    const bf16** value_rows = key_rows + round_up(keys, kGroup);
    const bf16** next_rows = value_rows + round_up(keys, kGroup);
    find_rows(call, tile, call.k_cache, key0, keys, key_rows);
    find_rows(call, tile, call.v_cache, key0, keys, value_rows);
    const int64_t next_keys = std::min(kGroup, tile.keys - key0 - keys);
    if (next_keys > 0) {
        find_rows(call, tile, call.k_cache, key0 + keys, next_keys, next_rows);
    } else {
        std::fill(next_rows, next_rows + kGroup, value_rows[keys - 1]);
    }
    for (int64_t j = 0; j < keys; j += kGroup) {
        RowPrefetch ahead(key_rows + j, tile.kv_heads * dim);
        for (int64_t h = 0; h < tile.kv_heads; ++h) {
            pack_keys(key_rows + j, h * dim, keys - j, dim, ahead, buffers.packed);
            const int64_t r = h * tile.rows;
            product_rows(buffers.q + r * pairs, pairs, tile.rows, buffers.packed, pairs,
                         buffers.scores + r * AttentionBuffers::kScoreStride + j,
                         AttentionBuffers::kScoreStride, true);
        }
    }
    const int64_t last_query = (tile.row0 + tile.rows - 1) / call.group();
    for (int64_t r = 0; r < tile.all_rows(); ++r) {
        const int64_t hidden = last_query - RowPlace(call, tile, r).query;
        softmax_row(buffers.scores + r * AttentionBuffers::kScoreStride,
                    std::min(keys, tile.keys - hidden - key0), keys, call.scale,
                    reinterpret_cast<bf16*>(buffers.p + r * (kKeyBlock / 2)), out.max + r,
                    out.sum + r);
    }
    for (int64_t j = 0; j < keys; j += kGroup) {
        const int64_t count = std::min(kGroup, keys - j);
        RowPrefetch ahead(value_rows + j, tile.kv_heads * dim);
        for (int64_t h = 0; h < tile.kv_heads; ++h) {
            pack_values(value_rows + j, h * dim, count, dim, padded_dim, ahead, buffers.packed);
            const int64_t r = h * tile.rows;
            for (int64_t d = 0; d < padded_dim; d += kGroup) {
                product_rows(buffers.p + r * (kKeyBlock / 2) + j / 2, kKeyBlock / 2, tile.rows,
                             buffers.packed + d * (kGroup / 2), (count + 1) / 2,
                             out.values + r * padded_dim + d, padded_dim, j == 0);
            }
        }
    }
}

void merge(const RowSums& into, const RowSums& part, int64_t rows, int64_t padded_dim) {
    for (int64_t r = 0; r < rows; ++r) {
        const float top = std::max(into.max[r], part.max[r]);
        const float a = rescale(into.max[r], top), b = rescale(part.max[r], top);
        into.max[r] = top;
        into.sum[r] = into.sum[r] * a + part.sum[r] * b;
        const __m512 av = _mm512_set1_ps(a), bv = _mm512_set1_ps(b);
        float* x = into.values + r * padded_dim;
        const float* y = part.values + r * padded_dim;
        for (int64_t d = 0; d < padded_dim; d += kLanes) {
            const __m512 sum = _mm512_fmadd_ps(_mm512_loadu_ps(x + d), av,
                                               _mm512_mul_ps(_mm512_loadu_ps(y + d), bv));
            _mm512_storeu_ps(x + d, sum);
        }
    }
}

void finish(const AttentionCall& call, const RowTile& tile, const RowSums& sums) {
    const int64_t padded_dim = call.padded_dim();
    for (int64_t r = 0; r < tile.all_rows(); ++r) {
        bf16* out = call.out + RowPlace(call, tile, r).offset(call);
        const __m512 factor = _mm512_set1_ps(1.0f / sums.sum[r]);
        for (int64_t d = 0; d < call.dim; d += kLanes) {
            const __m512 v = _mm512_loadu_ps(sums.values + r * padded_dim + d);
            store_bf16(out + d, _mm512_mul_ps(v, factor), first_lanes(call.dim - d));
        }
    }
}

}  // namespace pymllm
