// Attention of a tile of query rows over one block of keys, and the merge of block results.
//
// The keys of a sequence are cut into blocks of 256 at multiples of 256. Each block gives
// (max, sum, weighted values) on its own, and the blocks of a row are merged in order. Masked keys
// contribute exact zeros. So a row's bits depend on nothing but its own query, keys and position:
// not on the chunking of the prompt, the batch, the threads or whether blocks ran in parallel.
#pragma once

#include "vec.h"

namespace pymllm {

constexpr int64_t kKeyBlock = 256;
// Rows (query positions x heads of one group) per tile. Per thread: scores 96 x 272 x 4 B =
// 104 KB, probabilities 50 KB, queries 24 KB, sums 2 x 48 KB: within the 1 MB L2. Packing a key
// costs about 24 shuffles and is shared by the rows.
constexpr int64_t kMaxTileRows = 96;
// Keys packed at a time (D = 128: 16 KB, a third of L1) and columns of a packed group: 4 vectors,
// with 6 rows 24 accumulators.
constexpr int64_t kGroup = 64;

struct AttentionCall {
    const bf16* q;
    const bf16* k_cache;
    const bf16* v_cache;
    const int32_t* page_table;
    const int32_t* query_start;
    const int32_t* kv_lens;
    bf16* out;
    int64_t max_pages, page_size, q_heads, kv_heads, dim;
    float scale;

    int64_t group() const { return q_heads / kv_heads; }
    int64_t padded_dim() const { return (dim + kGroup - 1) / kGroup * kGroup; }
};

// One task: neighbouring kv heads of one sequence, and for each of them the rows
// [row0, row0 + rows) of its (query, head of the group) rows. Prompts have one kv head and many
// rows; a decode step has few rows and takes many kv heads, whose keys lie side by side in memory.
struct RowTile {
    int64_t seq, kv_head, kv_heads, row0, rows;
    int64_t keys;  // keys visible to its last row
    int64_t blocks() const { return (keys + kKeyBlock - 1) / kKeyBlock; }
    int64_t all_rows() const { return kv_heads * rows; }
};

// Where row `r` of a tile (kv head by kv head) comes from and goes to.
struct RowPlace {
    int64_t query, token, head;
    RowPlace(const AttentionCall& call, const RowTile& tile, int64_t r)
        : query((tile.row0 + r % tile.rows) / call.group()),
          token(call.query_start[tile.seq] + query),
          head((tile.kv_head + r / tile.rows) * call.group() +
               (tile.row0 + r % tile.rows) % call.group()) {}
    int64_t offset(const AttentionCall& call) const {
        return (token * call.q_heads + head) * call.dim;
    }
};

// Running or partial result of a tile: per row the maximal score, the sum of e^(score - max)
// and the sum of e^(score - max) * v ([rows][padded_dim]).
struct RowSums {
    float* max;
    float* sum;
    float* values;
    static int64_t floats(int64_t rows, int64_t padded_dim) { return rows * (padded_dim + 32); }
    static RowSums at(float* memory, int64_t rows, int64_t padded_dim) {
        return {memory + rows * padded_dim, memory + rows * padded_dim + rows * 16, memory};
    }
};

// Working memory of one thread, carved from one buffer.
struct AttentionBuffers {
    uint32_t* q;       // [rows][dim / 2] pairs
    uint32_t* packed;  // K or V of 64 keys in pairs, small enough for L1
    float* scores;     // [rows][kScoreStride]
    uint32_t* p;       // [rows][128] pairs of probabilities
    const bf16** rows;  // addresses of the block's keys and values and of 64 keys to come

    static constexpr int64_t kRowList = 2 * kKeyBlock + kGroup;

    // 16 more than the block, lest all rows of a column share one L1 set.
    static constexpr int64_t kScoreStride = kKeyBlock + 16;
    static int64_t bytes(int64_t dim, int64_t padded_dim);
    static AttentionBuffers at(char* memory, int64_t dim, int64_t padded_dim);
};

// Copies the tile's query rows into the buffers.
void gather_queries(const AttentionCall& call, const RowTile& tile, AttentionBuffers& buffers);

// The partial result of `tile` over key block `block`.
void attend_block(const AttentionCall& call, const RowTile& tile, int64_t block,
                  AttentionBuffers& buffers, const RowSums& out);

// into += part, for `rows` rows.
void merge(const RowSums& into, const RowSums& part, int64_t rows, int64_t padded_dim);

// Divides by the sums and writes the tile's rows of the result.
void finish(const AttentionCall& call, const RowTile& tile, const RowSums& sums);

}  // namespace pymllm
