// Rows of cached keys and values -> groups of pairs for the register tile, with prefetching.
#pragma once

#include <algorithm>

#include "attention.h"
#include "transpose.h"

namespace pymllm {

// Requests the 64 rows after a group line by line, a few at each step of the work on the group: a
// burst of requests would fill the queue of misses and stall. The rows of all kv heads of the
// tile are taken as a whole, since memory is fastest in address order.
class RowPrefetch {
public:
    RowPrefetch(const bf16* const* rows, int64_t width)
        : row_(rows + kGroup), end_(rows + 2 * kGroup), width_(width) {}
    void lines(int64_t count) {
        for (; count > 0 && row_ != end_; --count) {
            _mm_prefetch(reinterpret_cast<const char*>(*row_ + at_), _MM_HINT_T0);
            at_ += 32;
            if (at_ >= width_) {
                at_ = 0;
                ++row_;
            }
        }
    }

private:
    const bf16* const* row_;
    const bf16* const* end_;
    int64_t width_;  // values
    int64_t at_ = 0;
};

// The first `count` of 64 rows of keys as [dim / 2][64 keys] pairs, zeros for the others; the
// rows begin `shift` values after the given addresses.
inline void pack_keys(const bf16* const* rows, int64_t shift, int64_t count, int64_t dim,
                      RowPrefetch& ahead, uint32_t* out) {
    const int64_t pairs = dim / 2;
    for (int64_t part = 0; part < kGroup; part += kLanes, rows += kLanes, out += kLanes) {
        const int64_t left = count - part;
        for (int64_t p0 = 0; p0 < pairs; p0 += kLanes) {
            ahead.lines(kLanes);
            __m512i block[16];
            if (left >= kLanes && p0 + kLanes <= pairs) {
                for (int i = 0; i < kLanes; ++i) {
                    block[i] = _mm512_loadu_si512(rows[i] + shift + 2 * p0);
                }
            } else {
                for (int i = 0; i < kLanes; ++i) {
                    block[i] = i < left ? load_pairs(rows[i] + shift, p0, dim) : _mm512_setzero_si512();
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
inline constexpr Interleave kInterleave;

// The first `count` of 64 rows of values as [dim group][32 key pairs][64 dims] pairs
// (v[2j][d], v[2j+1][d]), zeros beyond `count` and `dim`.
inline void pack_values(const bf16* const* rows, int64_t shift, int64_t count, int64_t dim,
                        int64_t padded_dim, RowPrefetch& ahead, uint32_t* out) {
    const __m512i low = _mm512_load_si512(kInterleave.low);
    const __m512i high = _mm512_load_si512(kInterleave.high);
    auto store = [low, high](uint32_t* at, __m512i a, __m512i b) {
        _mm512_storeu_si512(at, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(at + kLanes, _mm512_permutex2var_epi16(a, high, b));
    };
    for (int64_t j = 0; j < count; j += 2, out += kGroup) {
        ahead.lines(dim / 16);
        const bf16* even = rows[j] + shift;
        const bf16* odd = rows[j + 1] + shift;
        auto at = [out](int64_t d) {
            return out + d / kGroup * (kGroup / 2 * kGroup) + d % kGroup;
        };
        const bool whole = j + 1 < count;
        int64_t d = 0;
        for (; whole && d + 32 <= dim; d += 32) {
            store(at(d), _mm512_loadu_si512(even + d), _mm512_loadu_si512(odd + d));
        }
        for (; d < padded_dim; d += 32) {
            store(at(d), load_pairs(even, d / 2, dim),
                  whole ? load_pairs(odd, d / 2, dim) : _mm512_setzero_si512());
        }
    }
}

}  // namespace pymllm
