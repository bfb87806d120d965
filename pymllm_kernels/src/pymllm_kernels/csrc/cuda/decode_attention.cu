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
#ifdef PYMLLM_EMULATED
#include "emulated_cuda.h"
#else
#include "warp.h"
#endif
#include "decode_attention.h"

namespace {

constexpr int kDim = PYMLLM_DIM;
constexpr int kTile = 16;             // tokens a warp takes at a time: the rows of an mma
constexpr int kPieces = kDim / 8;     // of 16 bytes in a row
constexpr int kParts = kDim / 32;     // pieces of a head that one lane of four holds
constexpr int kMatrix = kTile * kDim; // numbers of a tile's keys, or values
constexpr int kMaxGroup = 16;
constexpr int kSumStride = kDim + 4;  // floats; lanes of different heads meet different banks
constexpr float kNone = -INFINITY;

// Where a piece of a row lies in shared memory. Keys are read by 8 lanes at a time, 4 pieces of 2 rows each; values
// a piece of 8 rows at a time. Both meet all 32 banks.
DEVICE constexpr int key_at(int row, int piece) { return row * kDim + (piece ^ ((row & 1) << 2)) * 8; }
DEVICE constexpr int value_at(int row, int piece) { return row * kDim + (piece ^ (row & 7)) * 8; }

template <int kWarps, int kStages>
constexpr int shared_bytes() {
    return kWarps * kStages * 2 * kMatrix * 2 + kWarps * kMaxGroup * 8 + 16;
}

// Behind them, in the first block of a cluster: what the others push. [block, head, kDim + 2]
HOST_DEVICE constexpr int inbox_floats(int blocks, int group) { return (blocks - 1) * group * (kDim + 2); }

// One 16-byte load.
DEVICE uint4 load_piece(const uint16_t* pointer) { return *reinterpret_cast<const uint4*>(pointer); }

DEVICE void widen(float (&x)[8], uint4 piece) {
    const uint32_t pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = unpack(pairs[i]);
        x[2 * i] = two.x;
        x[2 * i + 1] = two.y;
    }
}

DEVICE uint4 narrow(const float (&x)[8]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// The rotation of one position, rounded as numbers of the computation: dimensions 32 j + 8 part + 0..7, j < kParts / 2.
struct Angles {
    uint4 cos[kParts / 2], sin[kParts / 2];
};

DEVICE uint4 load_rounded(const float* pointer) {
    const float4 a = *reinterpret_cast<const float4*>(pointer), b = *reinterpret_cast<const float4*>(pointer + 4);
    return make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
}

// RMSNorm and rotation of a head that four lanes hold, with the roundings of `nn.ops`. Piece j of lane `part` has
// the dimensions 32 j + 8 part + 0..7, so that a lane holds both numbers of each rotated pair. All lanes call it,
// and agree on `norms`: whether any of them has a norm.
DEVICE void norm_rotate(uint4 (&head)[kParts], const uint4 (&gain)[kParts], bool norms, bool norm,
                        const Angles& angles, float eps) {
    float x[kParts][8];
#pragma unroll
    for (int j = 0; j < kParts; ++j) widen(x[j], head[j]);
    if (norms) {
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < kParts; ++j)
#pragma unroll
            for (int i = 0; i < 8; ++i) squares += x[j][i] * x[j][i];
        squares += across(squares, 1);
        squares += across(squares, 2);
        const float scale = inverse_root(squares * (1.0f / kDim) + eps);
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
#pragma unroll
            for (int i = 0; i < 8; ++i) x[j][i] *= scale;
            const uint4 even = narrow(x[j]);
            if (norm)
                head[j] = make_uint4(multiply_pair(even.x, gain[j].x), multiply_pair(even.y, gain[j].y),
                                     multiply_pair(even.z, gain[j].z), multiply_pair(even.w, gain[j].w));
            widen(x[j], head[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < kParts / 2; ++j) {
        float cos[8], sin[8];
        widen(cos, angles.cos[j]);
        widen(sin, angles.sin[j]);
        float(&low)[8] = x[j], (&high)[8] = x[j + kParts / 2];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float turned = low[i] * cos[i] - high[i] * sin[i];
            high[i] = high[i] * cos[i] + low[i] * sin[i];
            low[i] = turned;
        }
        head[j] = narrow(low);
        head[j + kParts / 2] = narrow(high);
    }
}

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

// kColumns: mma columns, in eights, for the group's heads. kSpare: one of them is left for the new token's key, which
// is prepared with the queries; what else comes of that column is not used.
template <int kWarps, int kStages, int kColumns, bool kSpare>
DEVICE void decode(const DecodeArguments& a, int split, int kv_head, int64_t sequence, int thread, uint16_t* shared) {
    launch_dependents();
    const int warp = thread / 32, lane = thread % 32;
    const int row = lane / 4, part = lane % 4;  // of a fragment
    const int group = a.group, kv_heads = a.kv_heads;
    const int64_t heads = static_cast<int64_t>(kv_heads) * group;

    // Lengths, tables and the cache of earlier steps are there before the step's first kernel, and read before the
    // kernel before this one has ended; but keys and values that another kernel prepares are not.
    if (!a.prepare) wait_for_previous();
    int length = a.kv_lens[sequence];
    if (a.prepare) length = max(length, 1);  // padding: nothing but the new token
    const int cached = a.prepare ? length - 1 : length;
    const int blocks = (length + kWarps * kTile - 1) / (kWarps * kTile);
    const int each = max((blocks + (1 << a.splits_shift) - 1) >> a.splits_shift, a.least);
    const int active = max((blocks + each - 1) / each, 1);
    // Splits of a cluster meet in its first block, the clusters then in memory.
    const int cluster = 1 << a.cluster_shift, rank = split & (cluster - 1);
    const int members = min(cluster, active - (split - rank)), groups = (active + cluster - 1) >> a.cluster_shift;
    float* const tops = reinterpret_cast<float*>(shared + kWarps * kStages * 2 * kMatrix);  // [warp, head, 2]
    uint64_t* const pushed = reinterpret_cast<uint64_t*>(tops + kWarps * kMaxGroup * 2);
    float* const inbox = tops + kWarps * kMaxGroup * 2 + 4;
    if (cluster > 1) {
        if (rank == 0 && thread == 0) expect_pushes(pushed, inbox_floats(members, group) * 4);
        arrive_begun();  // those without work, too: a thread that exits instead is noticed late
    }
    if (split >= active) return;
    const int tiles = (length + kTile - 1) / kTile;
    const int end = min((split + 1) * each * kWarps, tiles);
    const int first = split * each * kWarps + warp;

    // ---- the cache, on its way ----

    const int32_t* const table = a.page_table + sequence * a.table_stride;
    const uint16_t* const keys = a.k_cache + kv_head * kDim;
    const uint16_t* const values = a.v_cache + kv_head * kDim;
    uint16_t* const mine = shared + warp * kStages * 2 * kMatrix;
    // A lane's token of a tile (two lanes have the same one): its slot, negative where the cache has none.
    auto find_slot = [&](int tile) {
        const int token = tile * kTile + lane % kTile;
        if (tile >= end || token >= cached) return -1;
        return (table[token >> a.page_shift] << a.page_shift) | (token & ((1 << a.page_shift) - 1));
    };
    auto fetch = [&](int stage, int slot) {
        uint16_t* const to = mine + stage * 2 * kMatrix;
#pragma unroll
        for (int i = 0; i < kPieces / 2; ++i) {
            const int at = (i * 32 + lane) / kPieces, piece = (i * 32 + lane) % kPieces;
            const int from = from_lane(slot, at);
            const int64_t offset = static_cast<int64_t>(max(from, 0)) * a.cache_stride + piece * 8;
            copy_async(to + key_at(at, piece), keys + offset, from >= 0);
            copy_async(to + kMatrix + value_at(at, piece), values + offset, from >= 0);
        }
    };
    int slots[kStages];
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) slots[stage] = find_slot(first + stage * kWarps);
#pragma unroll 1  // less code to fetch
    for (int stage = 0; stage < kStages; ++stage) {
        int slot = slots[0];
#pragma unroll
        for (int i = 1; i < kStages; ++i)
            if (stage == i) slot = slots[i];
        if (first + stage * kWarps < end) fetch(stage, slot);
        copy_commit();
    }
    int next_slot = find_slot(first + kStages * kWarps);

    // ---- queries, and the new token's key and value ----

    const int last = tiles - 1;  // the tile of the new token
    const bool owner = a.prepare && last < end && last >= first && (last - first) % kWarps == 0;
    uint4 q[kColumns + !kSpare][kParts];  // the new key behind the queries: in row `group`, or in a column of its own
    uint4 fresh = make_uint4(0, 0, 0, 0);  // the new value: a piece of each of the first lanes
    constexpr int kLast = kSpare ? kColumns - 1 : kColumns;
    const bool has_key = owner && row == (kSpare ? group % 8 : 0);
    {
        const uint16_t* const from = a.q + sequence * a.q_stride;
        Angles angles;
        uint4 gain[kParts], last_gain[kParts];
        const uint16_t* const last_weight = has_key ? a.k_weight : a.q_weight;
        int64_t home = -1;
        if (a.prepare) {
            const float* const angle = a.cos_sin + a.positions[sequence] * kDim + part * 8;
#pragma unroll
            for (int j = 0; j < kParts / 2; ++j) {
                angles.cos[j] = load_rounded(angle + 32 * j);
                angles.sin[j] = load_rounded(angle + kDim / 2 + 32 * j);
            }
#pragma unroll
            for (int j = 0; j < kParts; ++j) {
                const uint4 none = make_uint4(0, 0, 0, 0);
                gain[j] = a.q_weight ? load_piece(a.q_weight + 32 * j + 8 * part) : none;
                last_gain[j] = last_weight ? load_piece(last_weight + 32 * j + 8 * part) : none;
            }
            if (owner) home = a.slots[sequence];
        }
        if (members > 1) wait_begun();
        if (a.prepare) wait_for_previous();
        const uint16_t* const key = from + (heads + kv_head) * kDim;
#pragma unroll
        for (int n = 0; n <= kLast; ++n) {
            const int head = n * 8 + row;
            const bool is_key = n == kLast && has_key;
            const uint16_t* const at = (is_key ? key : from + (kv_head * group + head) * kDim) + part * 8;
#pragma unroll
            for (int j = 0; j < kParts; ++j)
                q[n][j] = is_key || head < group ? load_piece(at + 32 * j) : make_uint4(0, 0, 0, 0);
        }
        if (owner && lane < kPieces) fresh = load_piece(key + kv_heads * kDim + lane * 8);
        if (a.prepare) {
#pragma unroll
            for (int n = 0; n <= kLast; ++n) {
                if (n == kColumns && !owner) break;
                const bool norms = a.q_weight || a.k_weight;
                if (n == kLast)
                    norm_rotate(q[n], last_gain, norms, last_weight != nullptr, angles, a.eps);
                else
                    norm_rotate(q[n], gain, norms, a.q_weight != nullptr, angles, a.eps);
            }
        }
        if (home >= 0) {
            const int64_t to = home * a.cache_stride + kv_head * kDim;
            if (lane < kPieces) *reinterpret_cast<uint4*>(a.v_cache + to + lane * 8) = fresh;
            if (has_key)
#pragma unroll
                for (int j = 0; j < kParts; ++j)
                    *reinterpret_cast<uint4*>(a.k_cache + to + 32 * j + 8 * part) = q[kLast][j];
        }
    }

    // ---- the tiles ----

    float top[kColumns][2], total[kColumns][2];  // of heads 8 n + 2 part and the next
    float sum[kColumns][kDim / 16][4];           // dimension 16 m + row (+ 8) of those heads
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) top[n][h] = kNone, total[n][h] = 0.0f;
#pragma unroll
        for (int m = 0; m < kDim / 16; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[n][m][i] = 0.0f;
    }
    int stage = 0;
    for (int tile = first; tile < end; tile += kWarps) {
        uint16_t* const key = mine + stage * 2 * kMatrix;
        uint16_t* const value = key + kMatrix;
        copy_wait<kStages - 1>();
        sync_warp();
        if (owner && tile == last) {
            const int at = cached % kTile;
            if (lane < kPieces) *reinterpret_cast<uint4*>(value + value_at(at, lane)) = fresh;
            if (has_key)
#pragma unroll
                for (int j = 0; j < kParts; ++j)
                    *reinterpret_cast<uint4*>(key + key_at(at, 4 * j + part)) = q[kLast][j];
            sync_warp();
        }
        // Scores [16 tokens, 8 heads]. The order of the dimensions in a product is free: a lane's 16 bytes of a row
        // are its operands of two products, in q alike.
        float score[kColumns][2][4];
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[n][0][i] = score[n][1][i] = 0.0f;
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
            const uint4 low = load_piece(key + key_at(row, 4 * j + part));
            const uint4 high = load_piece(key + key_at(row + 8, 4 * j + part));
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                multiply(score[n][0], low.x, high.x, low.y, high.y, q[n][j].x, q[n][j].y);
                multiply(score[n][1], low.z, high.z, low.w, high.w, q[n][j].z, q[n][j].w);
            }
        }
        uint32_t p[kColumns][2];
        const int token = tile * kTile + row;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
            float s[4], shrink[2];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool seen = token + (i / 2) * 8 < length;
                s[i] = seen ? (score[n][0][i] + score[n][1][i]) * a.scale : kNone;
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float best = fmaxf(s[h], s[h + 2]);
                best = fmaxf(best, across(best, 4));
                best = fmaxf(best, across(best, 8));
                best = fmaxf(best, across(best, 16));
                best = fmaxf(best, top[n][h]);
                shrink[h] = exp_2(top[n][h] - best);
                top[n][h] = best;
                s[h] = exp_2(s[h] - best);
                s[h + 2] = exp_2(s[h + 2] - best);
                total[n][h] = total[n][h] * shrink[h] + (s[h] + s[h + 2]);
            }
            // From [token, head] to [head, token].
            p[n][0] = transpose(pack(s[0], s[1]));
            p[n][1] = transpose(pack(s[2], s[3]));
#pragma unroll
            for (int m = 0; m < kDim / 16; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[n][m][i] *= shrink[i % 2];
        }
#pragma unroll
        for (int m = 0; m < kDim / 16; ++m) {
            uint32_t v[4];
            load_transposed(v, value + value_at(lane % 8 + lane / 16 * 8, 2 * m + lane / 8 % 2));
#pragma unroll
            for (int n = 0; n < kColumns; ++n) multiply(sum[n][m], v[0], v[1], v[2], v[3], p[n][0], p[n][1]);
        }
        sync_warp();  // all lanes have read before the next tile comes in
        if (tile + kStages * kWarps < end) {
            fetch(stage, next_slot);
            next_slot = find_slot(tile + (kStages + 1) * kWarps);
        }
        copy_commit();
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    // ---- the warps meet ----

    float* const sums = reinterpret_cast<float*>(mine);  // [head, dimension], over the tiles that were read
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int head = n * 8 + 2 * part + h;
            float whole = total[n][h];
            whole += across(whole, 4);
            whole += across(whole, 8);
            whole += across(whole, 16);
            if (head < group) {
                if (row == 0) {
                    tops[(warp * kMaxGroup + head) * 2] = top[n][h];
                    tops[(warp * kMaxGroup + head) * 2 + 1] = whole;
                }
#pragma unroll
                for (int m = 0; m < kDim / 16; ++m) {
                    sums[head * kSumStride + 16 * m + row] = sum[n][m][h];
                    sums[head * kSumStride + 16 * m + row + 8] = sum[n][m][h + 2];
                }
            }
        }
    sync_block();
    const float* const all_sums = reinterpret_cast<const float*>(shared);
    constexpr int kWarpStride = kStages * kMatrix;  // floats from a warp's sums to the next one's
    uint16_t* const out = a.out + (sequence * heads + static_cast<int64_t>(kv_head) * group) * kDim;
    auto store = [&](int head, int d, const Share& all) {
        const float share = all.total > 0.0f ? inverse(all.total) : 0.0f;  // padding may have no tokens at all
        *reinterpret_cast<uint32_t*>(out + head * kDim + d) = pack(all.sum.x * share, all.sum.y * share);
    };
    const int64_t place = sequence * kv_heads + kv_head;
    const int64_t parts = place * ((1 << a.splits_shift) >> a.cluster_shift) * group;  // the row of the first cluster
    for (unsigned i = thread; i < group * kDim / 2u; i += kWarps * 32) {
        const int head = i / (kDim / 2), d = i % (kDim / 2) * 2;
        Share all = merge<kWarps>(kWarps, [&](int w) {
            const float* const stat = tops + (w * kMaxGroup + head) * 2;
            const float* const from = all_sums + w * kWarpStride + head * kSumStride + d;
            return Share{stat[0], stat[1], make_float2(from[0], from[1])};
        });
        if (rank != 0) {
            float* const to = inbox + ((rank - 1) * group + head) * (kDim + 2);
            push(to + d, all.sum, pushed);
            if (d == 0) push(to + kDim, make_float2(all.top, all.total), pushed);
            continue;
        }
        if (members > 1) {
            wait_pushes(pushed);
            all = merge<8>(members - 1, [&](int member) {
                const float* const from = inbox + (member * group + head) * (kDim + 2);
                return Share{from[kDim], from[kDim + 1], make_float2(from[d], from[d + 1])};
            }, all);
        }
        if (groups == 1) {
            store(head, d, all);
        } else {
            const int64_t to = parts + (split >> a.cluster_shift) * group + head;
            *reinterpret_cast<float2*>(a.partial + to * kDim + d) = all.sum;
            if (d == 0) *reinterpret_cast<float2*>(a.stats + to * 2) = make_float2(all.top, all.total);
        }
    }
    if (groups == 1 || rank != 0) return;

    // ---- the clusters meet ----

    int32_t* const arrived = reinterpret_cast<int32_t*>(pushed + 1);
    sync_block();  // all threads' stores come before the release of the one that counts
    if (thread == 0) *arrived = add_ordered(a.counters + place, 1);
    sync_block();
    if (*arrived != groups - 1) return;
    for (unsigned i = thread; i < group * kDim / 2u; i += kWarps * 32) {
        const int head = i / (kDim / 2), d = i % (kDim / 2) * 2;
        store(head, d, merge<8>(groups, [&](int g) {
            const int64_t from = parts + g * group + head;
            const float2 stat = load_l2(a.stats + from * 2);
            return Share{stat.x, stat.y, load_l2(a.partial + from * kDim + d)};
        }));
    }
    if (thread == 0) a.counters[place] = 0;
}

}  // namespace

#ifndef PYMLLM_STAGES
#define PYMLLM_STAGES 2
#endif

namespace {

constexpr int kDepth = PYMLLM_STAGES;

// Calls f with the instance for a group of heads as template arguments: kColumns and kSpare.
template <class F>
auto for_group(int group, const F& f) {
    if (group < 8) return f.template operator()<1, true>();
    if (group == 8) return f.template operator()<1, false>();
    return f.template operator()<2, false>();
}

}  // namespace

#ifndef PYMLLM_EMULATED

namespace {

template <int kWarps, int kColumns, bool kSpare>
__global__ void __launch_bounds__(kWarps * 32, kSpare && kWarps < 8 ? 12 / kWarps : 1)
    decode_kernel(const __grid_constant__ DecodeArguments a) {
    extern __shared__ __align__(128) uint16_t shared[];
    decode<kWarps, kDepth, kColumns, kSpare>(a, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, shared);
}

template <int kWarps>
struct SetUp {
    template <int kColumns, bool kSpare>
    cudaError_t operator()() const {
        const auto kernel = decode_kernel<kWarps, kColumns, kSpare>;
        int device, major, bytes;
        cudaError_t status = cudaGetDevice(&device);
        if (status != cudaSuccess) return status;
        status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (status != cudaSuccess) return status;
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (status != cudaSuccess) return status;
        status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        if (status != cudaSuccess || major < 9) return status;
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
};

template <int kWarps>
struct Launch {
    const DecodeArguments& a;
    cudaStream_t stream;

    template <int kColumns, bool kSpare>
    cudaError_t operator()() const {
        cudaLaunchAttribute attributes[2];
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(1 << a.splits_shift, a.kv_heads, a.batch);
        config.blockDim = dim3(kWarps * 32);
        config.dynamicSmemBytes = shared_bytes<kWarps, kDepth>();
        config.dynamicSmemBytes += inbox_floats(1 << a.cluster_shift, a.group) * 4;
        config.stream = stream;
        config.attrs = attributes;
        if (a.pdl) {
            attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
        }
        if (a.cluster_shift > 0) {
            attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
            attributes[config.numAttrs].val.clusterDim.x = 1 << a.cluster_shift;
            attributes[config.numAttrs].val.clusterDim.y = 1;
            attributes[config.numAttrs++].val.clusterDim.z = 1;
        }
        return cudaLaunchKernelEx(&config, decode_kernel<kWarps, kColumns, kSpare>, a);
    }
};

}  // namespace

// Both return a cudaError_t. The first one is called once for each device, outside of any capture.
extern "C" __attribute__((visibility("default"))) int pymllm_decode_attention_set_up() {
    for (const int group : {1, 8, 16}) {
        const cudaError_t all[] = {for_group(group, SetUp<4>{}), for_group(group, SetUp<8>{}),
#if PYMLLM_STAGES == 1
                                   for_group(group, SetUp<16>{}),
#endif
                                   for_group(group, SetUp<2>{})};
        for (const cudaError_t status : all)
            if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

extern "C" __attribute__((visibility("default"))) int pymllm_decode_attention(const DecodeArguments* a, void* stream) {
    if (a->group < 1 || a->group > kMaxGroup || a->batch < 1 || a->cluster_shift > a->splits_shift)
        return cudaErrorInvalidValue;
    const auto to = static_cast<cudaStream_t>(stream);
    if (a->warps == 2) return for_group(a->group, Launch<2>{*a, to});
    if (a->warps == 4) return for_group(a->group, Launch<4>{*a, to});
    if (a->warps == 8) return for_group(a->group, Launch<8>{*a, to});
#if PYMLLM_STAGES == 1
    if (a->warps == 16) return for_group(a->group, Launch<16>{*a, to});
#endif
    return cudaErrorInvalidValue;
}

// Bytes of a block without the inbox of a cluster, for benchmarks/cuda_resources.py.
extern "C" __attribute__((visibility("default"))) int pymllm_decode_attention_shared_memory(int warps) {
    return warps * shared_bytes<1, kDepth>() - (warps - 1) * 16;
}

#endif  // PYMLLM_EMULATED
