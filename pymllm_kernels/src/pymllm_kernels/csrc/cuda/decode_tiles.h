// A warp's way through the cache: tiles of 16 tokens through shared memory, and the softmax over them.
#pragma once

#include "decode_arguments.h"
#include "decode_head.h"

namespace {

constexpr int kTile = 16;              // tokens a warp takes at a time: the rows of an mma
constexpr int kMatrix = kTile * kDim;  // numbers of a tile's keys, or values
constexpr int kStages = 2;             // tiles of a warp that are on their way
constexpr int kWarpRoom = kStages * 2 * kMatrix;
constexpr int kSumStride = kDim + 4;  // floats; lanes of different heads meet different banks
constexpr float kNone = -INFINITY;

// Where a piece of a row lies in shared memory. Keys are read by 8 lanes at a time, 4 pieces of 2 rows each; values
// a piece of 8 rows at a time. Both meet all 32 banks.
DEVICE constexpr int key_at(int row, int piece) { return row * kDim + (piece ^ ((row & 1) << 2)) * 8; }
DEVICE constexpr int value_at(int row, int piece) { return row * kDim + (piece ^ (row & 7)) * 8; }

// Which tokens a block of one split has, and which tiles a warp of it.
struct Work {
    int split, kv_head;
    int64_t sequence;
    int warp, lane, row, part;  // row, part: of a fragment
    int length, cached;         // tokens, and those of them that the cache has
    int active;                 // splits that have tokens
    int first, end, last;       // the warp's first tile, the end of the block's, the sequence's last
};

template <int kWarps>
DEVICE Work find_work(const DecodeArguments& a, int split, int kv_head, int64_t sequence, int thread) {
    Work w;
    w.split = split, w.kv_head = kv_head, w.sequence = sequence;
    w.warp = thread / 32, w.lane = thread % 32, w.row = w.lane / 4, w.part = w.lane % 4;
    w.length = a.kv_lens[sequence];
    if (a.prepare) w.length = max(w.length, 1);  // padding: nothing but the new token
    w.cached = a.prepare ? w.length - 1 : w.length;
    const int blocks = (w.length + kWarps * kTile - 1) / (kWarps * kTile);
    const int each = max((blocks + (1 << a.splits_shift) - 1) >> a.splits_shift, a.least);
    w.active = max((blocks + each - 1) / each, 1);
    const int tiles = (w.length + kTile - 1) / kTile;
    w.first = split * each * kWarps + w.warp;
    w.end = min((split + 1) * each * kWarps, tiles);
    w.last = tiles - 1;
    return w;
}

// A warp's tiles on their way to its part of shared memory: keys and values of a stage, one after the other.
template <int kWarps>
struct Stream {
    const DecodeArguments& a;
    const Work& w;
    const int32_t* table;
    const uint16_t *keys, *values;
    uint16_t* room;
    int stage = 0, next_slot = -1;

    DEVICE Stream(const DecodeArguments& arguments, const Work& work, uint16_t* shared) : a(arguments), w(work) {
        table = a.page_table + w.sequence * a.table_stride;
        keys = a.k_cache + w.kv_head * kDim;
        values = a.v_cache + w.kv_head * kDim;
        room = shared + w.warp * kWarpRoom;
    }

    // A lane's token of a tile (two lanes have the same one): its slot, negative where the cache has none.
    DEVICE int find_slot(int tile) const {
        const int token = tile * kTile + w.lane % kTile;
        if (tile >= w.end || token >= w.cached) return -1;
        return (table[token >> a.page_shift] << a.page_shift) | (token & ((1 << a.page_shift) - 1));
    }

    DEVICE void fetch(int to_stage, int slot) const {
        uint16_t* const to = room + to_stage * 2 * kMatrix;
#pragma unroll
        for (int i = 0; i < kPieces / 2; ++i) {
            const int at = (i * 32 + w.lane) / kPieces, piece = (i * 32 + w.lane) % kPieces;
            const int from = from_lane(slot, at);
            const int64_t offset = static_cast<int64_t>(max(from, 0)) * a.cache_stride + piece * 8;
            copy_async(to + key_at(at, piece), keys + offset, from >= 0);
            copy_async(to + kMatrix + value_at(at, piece), values + offset, from >= 0);
        }
    }

    DEVICE void start() {
        int slots[kStages];
#pragma unroll
        for (int i = 0; i < kStages; ++i) slots[i] = find_slot(w.first + i * kWarps);
#pragma unroll 1  // less code to fetch
        for (int i = 0; i < kStages; ++i) {
            int slot = slots[0];
#pragma unroll
            for (int other = 1; other < kStages; ++other)
                if (i == other) slot = slots[other];
            if (w.first + i * kWarps < w.end) fetch(i, slot);
            copy_commit();
        }
        next_slot = find_slot(w.first + kStages * kWarps);
    }

    // The keys of the next tile, which is there; its values are kMatrix behind.
    DEVICE uint16_t* arrived() const {
        copy_wait<kStages - 1>();
        sync_warp();
        return room + stage * 2 * kMatrix;
    }

    // All lanes are done with `tile`; the one that takes its place is fetched.
    DEVICE void release(int tile) {
        sync_warp();
        if (tile + kStages * kWarps < w.end) {
            fetch(stage, next_slot);
            next_slot = find_slot(tile + (kStages + 1) * kWarps);
        }
        copy_commit();
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
};

// The running softmax of a warp, for 8 kColumns heads.
template <int kColumns>
struct Softmax {
    float top[kColumns][2], total[kColumns][2];  // of heads 8 n + 2 part and the next
    float sum[kColumns][kDim / 16][4];           // dimension 16 m + row (+ 8) of those heads

    DEVICE Softmax() {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) top[n][h] = kNone, total[n][h] = 0.0f;
#pragma unroll
            for (int m = 0; m < kDim / 16; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[n][m][i] = 0.0f;
        }
    }

    // One tile, of which `seen` tokens count.
    template <class Queries>
    DEVICE void step(const Work& w, const uint16_t* key, const Queries& q, int seen, float scale) {
        const uint16_t* const value = key + kMatrix;
        // Scores [16 tokens, 8 heads]. The order of the dimensions in a product is free: a lane's 16 bytes of a row
        // are its operands of two products, in q alike.
        float score[kColumns][2][4];
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) score[n][0][i] = score[n][1][i] = 0.0f;
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
            const uint4 low = load_piece(key + key_at(w.row, 4 * j + w.part));
            const uint4 high = load_piece(key + key_at(w.row + 8, 4 * j + w.part));
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                multiply(score[n][0], low.x, high.x, low.y, high.y, q[n][j].x, q[n][j].y);
                multiply(score[n][1], low.z, high.z, low.w, high.w, q[n][j].z, q[n][j].w);
            }
        }
        uint32_t p[kColumns][2];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
            float s[4], shrink[2];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                s[i] = w.row + i / 2 * 8 < seen ? (score[n][0][i] + score[n][1][i]) * scale : kNone;
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
            load_transposed(v, value + value_at(w.lane % 8 + w.lane / 16 * 8, 2 * m + w.lane / 8 % 2));
#pragma unroll
            for (int n = 0; n < kColumns; ++n) multiply(sum[n][m], v[0], v[1], v[2], v[3], p[n][0], p[n][1]);
        }
    }

    // To sums [head, kSumStride] and tops [head, 2]: the greatest score and the total of each head.
    DEVICE void deposit(const Work& w, int group, float* sums, float* tops) const {
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int head = n * 8 + 2 * w.part + h;
                float whole = total[n][h];
                whole += across(whole, 4);
                whole += across(whole, 8);
                whole += across(whole, 16);
                if (head >= group) continue;
                if (w.row == 0) tops[head * 2] = top[n][h], tops[head * 2 + 1] = whole;
#pragma unroll
                for (int m = 0; m < kDim / 16; ++m) {
                    sums[head * kSumStride + 16 * m + w.row] = sum[n][m][h];
                    sums[head * kSumStride + 16 * m + w.row + 8] = sum[n][m][h + 2];
                }
            }
    }
};

}  // namespace
