// Attention of one new token a sequence over a paged cache: q/k norm, rotary, cache write and split-KV decode.
//
// Block (split, KV head, sequence). Each warp streams tiles of 16 tokens of its own through shared memory, with a
// running softmax in base 2 (FlashAttention-2, arXiv:2307.08691; split-KV as in Flash-Decoding), and meets the
// others only at the end. Both products have tokens or dimensions as their 16 rows and the group's query heads as
// their 8 columns: scores = K q^T, then result^T = V^T p^T, so that a group of 1 to 8 costs one mma a 16 x 16 piece
// of the cache. What does not depend on the kernel before, the cache of earlier steps above all, is on its way
// before that kernel ends.
//
// Compiled with PYMLLM_DIM (64 or 128) and PYMLLM_HALF (warp.h).
#pragma once

#include "decode_meet.h"

namespace {

// The queries as operands of the products, and the new token's key and value.
//
// kColumns: mma columns, in eights, for the group's heads. kSpare: one of them is left for the new key, which is
// prepared with the queries; what else comes of that column is not used. Otherwise it has eight of its own.
template <int kWarps, int kColumns, bool kSpare>
struct Queries {
    static constexpr int kLast = kSpare ? kColumns - 1 : kColumns;  // the columns of the key

    uint4 q[kLast + 1][kParts];
    uint4 value;   // a piece of the new value in each of the first lanes
    bool owner;    // the warp has the new token
    bool has_key;  // the lane has its key

    DEVICE Queries(const DecodeArguments& a, const Work& w) {
        owner = a.prepare && w.last < w.end && w.last >= w.first && (w.last - w.first) % kWarps == 0;
        has_key = owner && w.row == (kSpare ? a.group % 8 : 0);
        value = make_uint4(0, 0, 0, 0);
    }

    // wait: until the kernel before has ended, on which q depends.
    template <class Wait>
    DEVICE void prepare(const DecodeArguments& a, const Work& w, const Wait& wait) {
        const uint4 none = make_uint4(0, 0, 0, 0);
        const uint16_t* const last_weight = has_key ? a.k_weight : a.q_weight;
        Angles angles;
        uint4 gain[kParts], last_gain[kParts];
        int64_t home = -1;
        if (a.prepare) {
            const float* const angle = a.cos_sin + a.positions[w.sequence] * kDim + w.part * 8;
#pragma unroll
            for (int j = 0; j < kParts / 2; ++j) {
                angles.cos[j] = load_rounded(angle + 32 * j);
                angles.sin[j] = load_rounded(angle + kDim / 2 + 32 * j);
            }
#pragma unroll
            for (int j = 0; j < kParts; ++j) {
                gain[j] = a.q_weight ? load_piece(a.q_weight + 32 * j + 8 * w.part) : none;
                last_gain[j] = last_weight ? load_piece(last_weight + 32 * j + 8 * w.part) : none;
            }
            if (owner) home = a.slots[w.sequence];
        }
        wait();
        const uint16_t* const from = a.q + w.sequence * a.q_stride;
        const uint16_t* const key = from + (static_cast<int64_t>(a.kv_heads) * a.group + w.kv_head) * kDim;
#pragma unroll
        for (int n = 0; n <= kLast; ++n) {
            const int head = n * 8 + w.row;
            const bool is_key = n == kLast && has_key;
            const uint16_t* const at = (is_key ? key : from + (w.kv_head * a.group + head) * kDim) + w.part * 8;
#pragma unroll
            for (int j = 0; j < kParts; ++j) q[n][j] = is_key || head < a.group ? load_piece(at + 32 * j) : none;
        }
        if (owner && w.lane < kPieces) value = load_piece(key + a.kv_heads * kDim + w.lane * 8);
        if (!a.prepare) return;
#pragma unroll
        for (int n = 0; n <= kLast; ++n) {
            if (n == kColumns && !owner) break;
            const bool norms = a.q_weight || a.k_weight;
            if (n == kLast)
                norm_rotate(q[n], last_gain, norms, last_weight != nullptr, angles, a.eps);
            else
                norm_rotate(q[n], gain, norms, a.q_weight != nullptr, angles, a.eps);
        }
        if (home < 0) return;
        const int64_t to = home * a.cache_stride + w.kv_head * kDim;
        if (w.lane < kPieces) *reinterpret_cast<uint4*>(a.v_cache + to + w.lane * 8) = value;
        if (has_key)
#pragma unroll
            for (int j = 0; j < kParts; ++j)
                *reinterpret_cast<uint4*>(a.k_cache + to + 32 * j + 8 * w.part) = q[kLast][j];
    }

    // The new token's row of its tile, which the cache does not have yet.
    DEVICE void insert(const Work& w, uint16_t* keys) const {
        const int at = w.cached % kTile;
        if (w.lane < kPieces) *reinterpret_cast<uint4*>(keys + kMatrix + value_at(at, w.lane)) = value;
        if (has_key)
#pragma unroll
            for (int j = 0; j < kParts; ++j)
                *reinterpret_cast<uint4*>(keys + key_at(at, 4 * j + w.part)) = q[kLast][j];
        sync_warp();
    }
};

template <int kWarps, int kColumns, bool kSpare>
DEVICE void decode(const DecodeArguments& a, int split, int kv_head, int64_t sequence, int thread, uint16_t* shared) {
    launch_dependents();
    // Lengths, tables and the cache of earlier steps are there before the step's first kernel, and read before the
    // kernel before this one has ended; but keys and values that another kernel prepares are not.
    if (!a.prepare) wait_for_previous();
    const Work w = find_work<kWarps>(a, split, kv_head, sequence, thread);
    const Meeting<kWarps> meeting(a, w, shared);
    meeting.begin(thread);
    if (split >= w.active) return;
    Stream<kWarps> stream(a, w, shared);
    stream.start();
    Queries<kWarps, kColumns, kSpare> queries(a, w);
    queries.prepare(a, w, [&] {
        meeting.wait_for_cluster();
        if (a.prepare) wait_for_previous();
    });
    Softmax<kColumns> softmax;
    for (int tile = w.first; tile < w.end; tile += kWarps) {
        uint16_t* const keys = stream.arrived();
        if (queries.owner && tile == w.last) queries.insert(w, keys);
        softmax.step(w, keys, queries.q, w.length - tile * kTile, a.scale);
        stream.release(tile);
    }
    // Over the tiles that were read.
    softmax.deposit(w, a.group, reinterpret_cast<float*>(stream.room), meeting.tops + w.warp * kMaxGroup * 2);
    meeting.finish(thread);
}

// Calls f with the instance for a group of heads as template arguments: kColumns and kSpare.
template <class F>
auto for_group(int group, const F& f) {
    if (group < 8) return f.template operator()<1, true>();
    if (group == 8) return f.template operator()<1, false>();
    return f.template operator()<2, false>();
}

}  // namespace
