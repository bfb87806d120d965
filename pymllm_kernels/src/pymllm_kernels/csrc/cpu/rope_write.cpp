// Per-head RMSNorm of q and k, RoPE, and the write of k and v into the cache.
#include "rms_norm.h"
#include "scratch.h"
#include "team.h"

namespace pymllm {
namespace {

// Below this many values one thread is done before a second has woken up.
constexpr int64_t kParallelValues = 64 * 1024;


// Rotates one head: the halves (a, b) become (a cos - b sin, b cos + a sin), in fp32.
void rotate(const bf16* in, const float* cos_sin, int64_t dim, bf16* out) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        const __mmask16 mask = first_lanes(half - i);
        const __m512 a = load_bf16(in + i, mask);
        const __m512 b = load_bf16(in + half + i, mask);
        const __m512 cos = _mm512_maskz_loadu_ps(mask, cos_sin + i);
        const __m512 sin = _mm512_maskz_loadu_ps(mask, cos_sin + half + i);
        store_bf16(out + i, _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)), mask);
        store_bf16(out + half + i, _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin)), mask);
    }
}

// Norm (where there is a weight) and rotation of one head. `normed` holds `dim` values.
void norm_rotate(const bf16* in, const bf16* weight, float eps, const float* cos_sin,
                 int64_t dim, bf16* normed, bf16* out) {
    if (weight != nullptr) {
        rms_norm_row(in, weight, eps, dim, normed);
        in = normed;
    }
    rotate(in, cos_sin, dim, out);
}

}  // namespace
}  // namespace pymllm

// qkv: [tokens][(q + 2 kv) * dim] bf16, rows ld apart. positions, slots: [tokens].
// cos_sin: [positions][dim] fp32, cosines first. Caches: [slots][kv][dim] bf16; a negative slot
// is not written. out: [tokens][q][dim] bf16.
extern "C" void pymllm_qk_norm_rope_write(
    const pymllm::bf16* qkv, int64_t ld, const int64_t* positions, const float* cos_sin,
    const pymllm::bf16* q_weight, const pymllm::bf16* k_weight, float eps, const int64_t* slots,
    pymllm::bf16* k_cache, pymllm::bf16* v_cache, pymllm::bf16* out, int64_t tokens,
    int64_t q_heads, int64_t kv_heads, int64_t dim, int threads) {
    using namespace pymllm;
    auto body = [&](int rank, int size) {
        thread_local Scratch scratch;
        auto* normed = scratch.get<bf16>(dim * sizeof(bf16));
        const Range mine = share(tokens, rank, size);
        for (int64_t t = mine.begin; t < mine.end; ++t) {
            const bf16* row = qkv + t * ld;
            const float* table = cos_sin + positions[t] * dim;
            for (int64_t h = 0; h < q_heads; ++h) {
                norm_rotate(row + h * dim, q_weight, eps, table, dim, normed,
                            out + (t * q_heads + h) * dim);
            }
            if (slots[t] < 0) continue;
            const bf16* k = row + q_heads * dim;
            const bf16* v = k + kv_heads * dim;
            const int64_t at = slots[t] * kv_heads * dim;
            for (int64_t h = 0; h < kv_heads; ++h) {
                norm_rotate(k + h * dim, k_weight, eps, table, dim, normed,
                            k_cache + at + h * dim);
            }
            std::memcpy(v_cache + at, v, kv_heads * dim * sizeof(bf16));
        }
    };
    const int64_t values = tokens * (q_heads + 2 * kv_heads) * dim;
    parallel(values >= kParallelValues ? threads : 1, body);
}
