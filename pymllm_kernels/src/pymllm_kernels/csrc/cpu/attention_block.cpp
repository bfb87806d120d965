// One tile of query rows against one block of keys (see attention.h).
#include <algorithm>
#include <limits>

#include "attention.h"
#include "dot_tile.h"
#include "transpose.h"

namespace pymllm {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
constexpr int kGroupVecs = kGroup / kLanes;
constexpr int kRowStep = 6;  // 6 rows x 4 vectors = 24 accumulators

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

void prefetch_row(const bf16* row, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 32) {
        _mm_prefetch(reinterpret_cast<const char*>(row + i), _MM_HINT_T0);
    }
}

// Addresses of the keys [key0, key0 + keys) of the tile in `cache`, at `rows`; the list is filled
// up to a whole group with its last row, for the prefetches to point somewhere.
void find_rows(const AttentionCall& call, const RowTile& tile, const bf16* cache, int64_t key0,
               int64_t keys, const bf16** rows) {
    const int32_t* pages = call.page_table + tile.seq * call.max_pages;
    int64_t page = key0 / call.page_size;
    int64_t offset = key0 % call.page_size;
    for (int64_t j = 0; j < keys; ++j) {
        const int64_t slot = pages[page] * call.page_size + offset;
        rows[j] = cache + (slot * call.kv_heads + tile.kv_head) * call.dim;
        if (++offset == call.page_size) {
            offset = 0;
            ++page;
        }
    }
    std::fill(rows + keys, rows + round_up(keys, kGroup), rows[keys - 1]);
}

// The first `count` of 64 rows of keys as [dim / 2][64 keys] pairs, zeros for the others.
// rows[64 ..], needed next, are requested on the way, spread over the work: a burst of requests
// would fill the queue of misses and stall. (The rows of one head lie kilobytes apart, beyond
// the hardware prefetchers.)
void pack_keys(const bf16* const* rows, int64_t count, int64_t dim, uint32_t* out) {
    const int64_t pairs = dim / 2;
    for (int64_t part = 0; part < kGroup; part += kLanes, rows += kLanes, out += kLanes) {
        const int64_t left = count - part;
        for (int64_t p0 = 0; p0 < pairs; p0 += kLanes) {
            for (int64_t i = kLanes * p0 / pairs; i < kLanes * (p0 + kLanes) / pairs && i < kLanes; ++i) {
                prefetch_row(rows[i + kGroup], dim);
            }
            __m512i block[16];
            if (left >= kLanes && p0 + kLanes <= pairs) {
                for (int i = 0; i < kLanes; ++i) block[i] = _mm512_loadu_si512(rows[i] + 2 * p0);
            } else {
                for (int i = 0; i < kLanes; ++i) {
                    block[i] = i < left ? load_pairs(rows[i], p0, dim) : _mm512_setzero_si512();
                }
            }
            transpose16(block);
            for (int i = 0; i < kLanes && p0 + i < pairs; ++i) {
                _mm512_storeu_si512(out + (p0 + i) * kGroup, block[i]);
            }
        }
    }
}

// Word indices that interleave two rows of 32 values: the low and the high 16 pairs.
struct Interleave {
    alignas(64) uint16_t low[32], high[32];
    constexpr Interleave() : low{}, high{} {
        for (uint16_t i = 0; i < 16; ++i) {
            low[2 * i] = i;
            low[2 * i + 1] = 32 + i;
            high[2 * i] = 16 + i;
            high[2 * i + 1] = 48 + i;
        }
    }
};
constexpr Interleave kInterleave;

// The first `count` of 64 rows of values as [dim group][32 key pairs][64 dims] pairs
// (v[2j][d], v[2j+1][d]), zeros beyond `count` and `dim`. Requests rows[64 ..] like pack_keys.
void pack_values(const bf16* const* rows, int64_t count, int64_t dim, int64_t padded_dim,
                 uint32_t* out) {
    const __m512i low = _mm512_load_si512(kInterleave.low);
    const __m512i high = _mm512_load_si512(kInterleave.high);
    auto store = [low, high](uint32_t* at, __m512i a, __m512i b) {
        _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(at + kLanes, _mm512_permutex2var_epi16(a, high, b));
    };
    for (int64_t j = 0; j < count; j += 2, out += kGroup) {
        prefetch_row(rows[j + kGroup], dim);
        prefetch_row(rows[j + 1 + kGroup], dim);
        auto at = [out](int64_t d) {
            return out + d / kGroup * (kGroup / 2 * kGroup) + d % kGroup;
        };
        const bool whole = j + 1 < count;
        int64_t d = 0;
        for (; whole && d + 32 <= dim; d += 32) {
            store(at(d), _mm512_loadu_si512(rows[j] + d), _mm512_loadu_si512(rows[j + 1] + d));
        }
        for (; d < padded_dim; d += 32) {
            store(at(d), load_pairs(rows[j], d / 2, dim),
                  whole ? load_pairs(rows[j + 1], d / 2, dim) : _mm512_setzero_si512());
        }
    }
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
    const int64_t group = call.group();
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t row = tile.row0 + r;
        const int64_t token = call.query_start[tile.seq] + row / group;
        const int64_t head = tile.kv_head * group + row % group;
        std::memcpy(buffers.q + r * (call.dim / 2),
                    call.q + (token * call.q_heads + head) * call.dim, call.dim * sizeof(bf16));
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
        pack_keys(key_rows + j, keys - j, dim, buffers.packed);
        product_rows(buffers.q, pairs, tile.rows, buffers.packed, pairs, buffers.scores + j,
                     AttentionBuffers::kScoreStride, true);
    }
    const int64_t group = call.group();
    const int64_t last_query = (tile.row0 + tile.rows - 1) / group;
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t query = (tile.row0 + r) / group;
        const int64_t visible = std::min(keys, tile.keys - (last_query - query) - key0);
        softmax_row(buffers.scores + r * AttentionBuffers::kScoreStride, visible, keys, call.scale,
                    reinterpret_cast<bf16*>(buffers.p + r * (kKeyBlock / 2)), out.max + r,
                    out.sum + r);
    }
    for (int64_t j = 0; j < keys; j += kGroup) {
        const int64_t count = std::min(kGroup, keys - j);
        pack_values(value_rows + j, count, dim, padded_dim, buffers.packed);
        for (int64_t d = 0; d < padded_dim; d += kGroup) {
            product_rows(buffers.p + j / 2, kKeyBlock / 2, tile.rows,
                         buffers.packed + d * (kGroup / 2), (count + 1) / 2, out.values + d,
                         padded_dim, j == 0);
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
    const int64_t group = call.group(), padded_dim = call.padded_dim();
    for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t row = tile.row0 + r;
        const int64_t token = call.query_start[tile.seq] + row / group;
        const int64_t head = tile.kv_head * group + row % group;
        bf16* out = call.out + (token * call.q_heads + head) * call.dim;
        const __m512 factor = _mm512_set1_ps(1.0f / sums.sum[r]);
        for (int64_t d = 0; d < call.dim; d += kLanes) {
            const __m512 v = _mm512_loadu_ps(sums.values + r * padded_dim + d);
            store_bf16(out + d, _mm512_mul_ps(v, factor), first_lanes(call.dim - d));
        }
    }
}

}  // namespace pymllm
