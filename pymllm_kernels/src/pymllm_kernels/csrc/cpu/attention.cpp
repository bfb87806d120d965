// Paged causal attention: the tasks of a call and their spread over the threads.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <vector>

#include "scratch.h"
#include "team.h"

namespace pymllm {
namespace {

// Fewer tiles than this per thread: the key blocks of a tile run in parallel, too.
constexpr int64_t kTilesPerThread = 4;
// ... unless the tile has so many rows that its partial results would not be small.
constexpr int64_t kMaxSplitRows = 16;

// All tiles, those with most keys first: the short ones then even out the threads.
std::vector<RowTile> make_tiles(const AttentionCall& call, int64_t sequences) {
    std::vector<RowTile> tiles;
    const int64_t group = call.group();
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t queries = call.query_start[s + 1] - call.query_start[s];
        const int64_t before = call.kv_lens[s] - queries;
        for (int64_t h = 0; h < call.kv_heads; ++h) {
            for (int64_t row = 0; row < queries * group; row += kMaxTileRows) {
                const int64_t rows = std::min(kMaxTileRows, queries * group - row);
                const int64_t last = (row + rows - 1) / group;
                tiles.push_back({s, h, row, rows, before + last + 1});
            }
        }
    }
    std::stable_sort(tiles.begin(), tiles.end(), [](const RowTile& a, const RowTile& b) {
        return a.keys * a.rows > b.keys * b.rows;
    });
    return tiles;
}

void clear(const RowSums& sums, int64_t rows, int64_t padded_dim) {
    std::fill_n(sums.max, rows, -std::numeric_limits<float>::infinity());
    std::fill_n(sums.sum, rows, 0.0f);
    std::fill_n(sums.values, rows * padded_dim, 0.0f);
}

// Memory of the calling thread: buffers, running sums and one partial result.
struct Workspace {
    AttentionBuffers buffers;
    RowSums total, part;

    explicit Workspace(const AttentionCall& call) {
        thread_local Scratch buffer_scratch, sums_scratch;
        const int64_t padded = call.padded_dim();
        const int64_t floats = RowSums::floats(kMaxTileRows, padded);
        buffers = AttentionBuffers::at(
            buffer_scratch.get<char>(AttentionBuffers::bytes(call.dim, padded)), call.dim, padded);
        auto* sums = sums_scratch.get<float>(2 * floats * sizeof(float));
        total = RowSums::at(sums, kMaxTileRows, padded);
        part = RowSums::at(sums + floats, kMaxTileRows, padded);
    }
};

// Every tile is one task.
void run_tiles(const AttentionCall& call, const std::vector<RowTile>& tiles, int threads) {
    std::atomic<int64_t> next{0};
    auto body = [&](int, int) {
        Workspace work(call);
        for (int64_t i; (i = next.fetch_add(1)) < static_cast<int64_t>(tiles.size());) {
            const RowTile& tile = tiles[i];
            gather_queries(call, tile, work.buffers);
            clear(work.total, tile.rows, call.padded_dim());
            for (int64_t block = 0; block < tile.blocks(); ++block) {
                attend_block(call, tile, block, work.buffers, work.part);
                merge(work.total, work.part, tile.rows, call.padded_dim());
            }
            finish(call, tile, work.total);
        }
    };
    parallel(threads, body);
}

// Every block of every tile is one task; the tiles are then merged, block by block in order.
void run_blocks(const AttentionCall& call, const std::vector<RowTile>& tiles, int threads) {
    const int64_t padded = call.padded_dim();
    struct Task {
        int64_t tile, block;
    };
    std::vector<Task> tasks;
    std::vector<int64_t> first(tiles.size());
    for (size_t i = 0; i < tiles.size(); ++i) {
        first[i] = static_cast<int64_t>(tasks.size());
        for (int64_t b = 0; b < tiles[i].blocks(); ++b) {
            tasks.push_back({static_cast<int64_t>(i), b});
        }
    }
    const int64_t floats = RowSums::floats(kMaxSplitRows, padded);
    thread_local Scratch partial_scratch;
    auto* partials = partial_scratch.get<float>(tasks.size() * floats * sizeof(float));
    std::atomic<int64_t> next_task{0}, next_tile{0};
    auto body = [&](int, int size) {
        Workspace work(call);
        for (int64_t i; (i = next_task.fetch_add(1)) < static_cast<int64_t>(tasks.size());) {
            const RowTile& tile = tiles[tasks[i].tile];
            gather_queries(call, tile, work.buffers);
            attend_block(call, tile, tasks[i].block, work.buffers,
                         RowSums::at(partials + i * floats, kMaxSplitRows, padded));
        }
        barrier(size);
        for (int64_t i; (i = next_tile.fetch_add(1)) < static_cast<int64_t>(tiles.size());) {
            const RowTile& tile = tiles[i];
            clear(work.total, tile.rows, padded);
            for (int64_t b = 0; b < tile.blocks(); ++b) {
                merge(work.total,
                      RowSums::at(partials + (first[i] + b) * floats, kMaxSplitRows, padded),
                      tile.rows, padded);
            }
            finish(call, tile, work.total);
        }
    };
    parallel(threads, body);
}

}  // namespace
}  // namespace pymllm

// q, out: [tokens][q_heads][dim] bf16. Caches: [slots][kv_heads][dim] bf16, slot = page *
// page_size + offset. page_table: [sequences][max_pages]. query_start: [sequences + 1].
// kv_lens: [sequences], keys after this step; query i of n stands at position kv_len - n + i.
extern "C" void pymllm_paged_attention(
    const pymllm::bf16* q, const pymllm::bf16* k_cache, const pymllm::bf16* v_cache,
    const int32_t* page_table, const int32_t* query_start, const int32_t* kv_lens,
    pymllm::bf16* out, int64_t sequences, int64_t max_pages, int64_t page_size, int64_t q_heads,
    int64_t kv_heads, int64_t dim, float scale, int threads) {
    using namespace pymllm;
    const AttentionCall call{q,   k_cache,   v_cache,   page_table, query_start, kv_lens,
                             out, max_pages, page_size, q_heads,    kv_heads,    dim,
                             scale};
    const std::vector<RowTile> tiles = make_tiles(call, sequences);
    if (tiles.empty()) return;
    const bool small_rows = std::all_of(tiles.begin(), tiles.end(), [](const RowTile& t) {
        return t.rows <= kMaxSplitRows;
    });
    if (small_rows && static_cast<int64_t>(tiles.size()) < kTilesPerThread * threads) {
        run_blocks(call, tiles, threads);
    } else {
        run_tiles(call, tiles, threads);
    }
}
