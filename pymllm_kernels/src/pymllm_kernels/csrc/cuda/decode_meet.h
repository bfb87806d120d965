// How warps, blocks of a cluster and clusters put their parts of a softmax together.
#pragma once

#include "decode_tiles.h"

namespace {

constexpr int kMaxGroup = 16;

// A softmax over some of the tokens: sum is of values times 2^(score - top), of two dimensions; total without values.
struct Share {
    float top, total;
    float2 sum;
};

// The softmax over all tokens of `count` shares; kTogether of them are loaded at a time.
template <int kTogether, class Get>
DEVICE Share merge(int count, const Get& get, Share all = {kNone, 0.0f, {0.0f, 0.0f}}) {
    for (int first = 0; first < count; first += kTogether) {
        Share some[kTogether];
        float top = all.top;
#pragma unroll
        for (int i = 0; i < kTogether; ++i)
            some[i] = first + i < count ? get(first + i) : Share{kNone, 0.0f, make_float2(0.0f, 0.0f)};
#pragma unroll
        for (int i = 0; i < kTogether; ++i) top = fmaxf(top, some[i].top);
        const float base = top == kNone ? 0.0f : top;
        const float kept = exp_2(all.top - base);
        all = Share{top, all.total * kept, make_float2(all.sum.x * kept, all.sum.y * kept)};
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const float weight = exp_2(some[i].top - base);
            all.total += some[i].total * weight;
            all.sum.x += some[i].sum.x * weight;
            all.sum.y += some[i].sum.y * weight;
        }
    }
    return all;
}

// Behind the tiles in shared memory: tops [warp, head, 2], the barrier of the pushes, and in the first block of a
// cluster its inbox [block, head, kDim + 2], into which the others push.
HOST_DEVICE constexpr int inbox_floats(int blocks, int group) { return (blocks - 1) * group * (kDim + 2); }

template <int kWarps>
constexpr int shared_bytes() {
    return kWarps * kWarpRoom * 2 + kWarps * kMaxGroup * 8 + 16;
}

template <int kWarps>
struct Meeting {
    const DecodeArguments& a;
    const Work& w;
    uint16_t* shared;
    float *tops, *inbox;
    uint64_t* pushed;
    int rank, members, clusters;  // in the cluster: this block's, and blocks with tokens; clusters with tokens

    DEVICE Meeting(const DecodeArguments& arguments, const Work& work, uint16_t* memory)
        : a(arguments), w(work), shared(memory) {
        tops = reinterpret_cast<float*>(shared + kWarps * kWarpRoom);
        pushed = reinterpret_cast<uint64_t*>(tops + kWarps * kMaxGroup * 2);
        inbox = tops + kWarps * kMaxGroup * 2 + 4;
        const int size = 1 << a.cluster_shift;
        rank = w.split & (size - 1);
        members = min(size, w.active - (w.split - rank));
        clusters = (w.active + size - 1) >> a.cluster_shift;
    }

    // Every block calls it first, those without tokens, too: a thread that exits instead is noticed late.
    DEVICE void begin(int thread) const {
        if (a.cluster_shift == 0) return;
        if (rank == 0 && members > 1 && thread == 0) expect_pushes(pushed, inbox_floats(members, a.group) * 4);
        arrive_begun();
    }

    // The cluster's first block can be pushed to.
    DEVICE void wait_for_cluster() const {
        if (members > 1) wait_begun();
    }

    DEVICE void store(int head, int d, const Share& all) const {
        const float share = all.total > 0.0f ? inverse(all.total) : 0.0f;  // padding may have no tokens at all
        const int64_t row = (w.sequence * a.kv_heads + w.kv_head) * a.group + head;
        *reinterpret_cast<uint32_t*>(a.out + row * kDim + d) = pack(all.sum.x * share, all.sum.y * share);
    }

    // Calls f(head, dimension) for this thread's pairs of dimensions.
    template <class F>
    DEVICE void for_each(int thread, const F& f) const {
        for (unsigned i = thread; i < a.group * kDim / 2u; i += kWarps * 32) f(i / (kDim / 2), i % (kDim / 2) * 2);
    }

    // All threads, when every warp has made its deposit.
    DEVICE void finish(int thread) const {
        sync_block();
        const int64_t place = w.sequence * a.kv_heads + w.kv_head;
        const int64_t first = (place << (a.splits_shift - a.cluster_shift)) * a.group;  // the row of the first cluster
        for_each(thread, [&](int head, int d) {
            Share all = merge<kWarps>(kWarps, [&](int warp) {
                const float* const top = tops + (warp * kMaxGroup + head) * 2;
                const float* const from = reinterpret_cast<const float*>(shared + warp * kWarpRoom) + head * kSumStride;
                return Share{top[0], top[1], make_float2(from[d], from[d + 1])};
            });
            if (rank != 0) {
                float* const to = inbox + ((rank - 1) * a.group + head) * (kDim + 2);
                push(to + d, all.sum, pushed);
                if (d == 0) push(to + kDim, make_float2(all.top, all.total), pushed);
                return;
            }
            if (members > 1) {
                wait_pushes(pushed);
                all = merge<8>(members - 1, [&](int member) {
                    const float* const from = inbox + (member * a.group + head) * (kDim + 2);
                    return Share{from[kDim], from[kDim + 1], make_float2(from[d], from[d + 1])};
                }, all);
            }
            if (clusters == 1) return store(head, d, all);
            const int64_t to = first + (w.split >> a.cluster_shift) * a.group + head;
            *reinterpret_cast<float2*>(a.partial + to * kDim + d) = all.sum;
            if (d == 0) *reinterpret_cast<float2*>(a.stats + to * 2) = make_float2(all.top, all.total);
        });
        if (clusters == 1 || rank != 0) return;
        int32_t* const arrived = reinterpret_cast<int32_t*>(pushed + 1);
        sync_block();  // all threads' stores come before the release of the one that counts
        if (thread == 0) *arrived = add_ordered(a.counters + place, 1);
        sync_block();
        if (*arrived != clusters - 1) return;
        for_each(thread, [&](int head, int d) {
            store(head, d, merge<8>(clusters, [&](int cluster) {
                const int64_t from = first + cluster * a.group + head;
                const float2 top = load_l2(a.stats + from * 2);
                return Share{top.x, top.y, load_l2(a.partial + from * kDim + d)};
            }));
        });
        if (thread == 0) a.counters[place] = 0;
    }
};

}  // namespace
