// Packing a row-major weight into tiles (see linear.h). Runs once per layer, in parallel.
#include "linear_pack.h"

#include "linear.h"
#include "team.h"
#include "transpose.h"

namespace pymllm {
namespace {

// The low halves of the 4 bytes of each dword, side by side in its low word.
__m512i squeeze(__m512i v) {
    v = _mm512_and_si512(v, _mm512_set1_epi8(0x0F));
    v = _mm512_and_si512(_mm512_or_si512(v, _mm512_srli_epi32(v, 4)), _mm512_set1_epi32(0x00FF00FF));
    return _mm512_and_si512(_mm512_or_si512(v, _mm512_srli_epi32(v, 8)), _mm512_set1_epi32(0xFFFF));
}

// A vector of 16 columns of 4 bytes along k, as it is stored.
template <int64_t FORMAT>
__m512i store_form(__m512i v) {
    if constexpr (FORMAT == kPackW8A8) {
        return _mm512_xor_si512(v, _mm512_set1_epi8(static_cast<char>(0x80)));
    } else if constexpr (FORMAT == kPackInt4) {
        const __m512i even = squeeze(v), odd = squeeze(_mm512_srli_epi32(v, 4));
        return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    } else if constexpr (FORMAT == kPackInt8) {
        const __m256i first = _mm512_cvtepi32_epi16(v);
        const __m256i second = _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16));
        return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    }
    return v;
}

template <int64_t FORMAT>
void pack_tile(const char* src, int64_t ld, int64_t bytes, const PackedLinear& to, int64_t t) {
    auto* dst = const_cast<uint32_t*>(to.at(t, 0));
    for (int half = 0; half < kTileVecs; ++half) {
        for (int64_t d0 = 0; d0 < to.dwords; d0 += kLanes) {
            __m512i block[16];
            for (int i = 0; i < kLanes; ++i) {
                const int64_t row = source_row(to.act, to.n_out, t, half * kLanes + i);
                block[i] = row < 0 ? _mm512_setzero_si512() : load_dwords(src + row * ld, d0, bytes);
            }
            transpose16(block);
            for (int i = 0; i < kLanes && d0 + i < to.dwords; ++i) {
                _mm512_storeu_si512(dst + (d0 + i) * to.step(t) + half * kLanes,
                                    store_form<FORMAT>(block[i]));
            }
        }
    }
}

}  // namespace
}  // namespace pymllm

// src: [n_out or 2 * n_out] rows of `bytes` bytes, `ld` bytes apart. to: all fields but bias; its
// weight is written.
extern "C" void pymllm_linear_pack(const char* src, int64_t ld, int64_t bytes,
                                   const pymllm::PackedLinear* to, int64_t format, int threads) {
    using namespace pymllm;
    constexpr decltype(&pack_tile<kPackBf16>) kPack[] = {
        pack_tile<kPackBf16>, pack_tile<kPackW8A8>, pack_tile<kPackInt4>, pack_tile<kPackInt8>};
    const auto pack = kPack[format];
    auto body = [&](int rank, int size) {
        const Range mine = share(to->tiles, rank, size);
        for (int64_t t = mine.begin; t < mine.end; ++t) {
            pack(src, ld, bytes, *to, t);
        }
    };
    parallel(threads, body);
}
