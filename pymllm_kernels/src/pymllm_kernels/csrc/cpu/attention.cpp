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

// Tasks wanted per thread, to even out their lengths.
constexpr int64_t kTasksPerThread = 4;
// A sequence with at most this many rows a kv head (a decode step) takes all kv heads together.
constexpr int64_t kFewRows = 16;

struct Plan {
    std::vector<RowTile> tiles;
    bool split = false;  // the key blocks of a tile are tasks of their own
};

// Long prompts give enough tiles. Decode steps with too few sequences for the threads run key
// block by key block, and, if that is not enough, with the kv heads divided.
Plan make_plan(const AttentionCall& call, int64_t sequences, int threads) {
    const int64_t group = call.group();
    const int64_t wanted = kTasksPerThread * threads;
    auto queries = [&](int64_t s) { return int64_t{call.query_start[s + 1]} - call.query_start[s]; };
    bool few_rows = true;
    int64_t used = 0, blocks = 0;
    for (int64_t s = 0; s < sequences; ++s) {
        few_rows = few_rows && queries(s) * group <= kFewRows;
        used += queries(s) > 0;
        blocks += queries(s) > 0 ? (call.kv_lens[s] + kKeyBlock - 1) / kKeyBlock : 0;
    }
    Plan plan;
    plan.split = few_rows && used < wanted && threads > 1;
    int64_t parts = 1;
    while (plan.split && parts < call.kv_heads && blocks * parts < wanted) parts *= 2;
    for (int64_t s = 0; s < sequences; ++s) {
        const int64_t all_rows = queries(s) * group;
        const int64_t tile_rows = std::min(all_rows, kMaxTileRows);
        int64_t heads = 1;
        if (all_rows > 0 && all_rows <= kFewRows) {
            heads = std::min((call.kv_heads + parts - 1) / parts, kMaxTileRows / all_rows);
        }
        const int64_t before = call.kv_lens[s] - queries(s);
        for (int64_t h = 0; h < call.kv_heads; h += heads) {
            for (int64_t row = 0; row < all_rows; row += tile_rows) {
                const int64_t rows = std::min(tile_rows, all_rows - row);
                plan.tiles.push_back({s, h, std::min(heads, call.kv_heads - h), row, rows,
                                      before + (row + rows - 1) / group + 1});
            }
        }
    }
    // The longest first: the short ones then even out the threads.
    std::stable_sort(plan.tiles.begin(), plan.tiles.end(),
                     [](const RowTile& a, const RowTile& b) {
                         return a.keys * a.all_rows() > b.keys * b.all_rows();
                     });
    return plan;
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
            clear(work.total, tile.all_rows(), call.padded_dim());
            for (int64_t block = 0; block < tile.blocks(); ++block) {
                attend_block(call, tile, block, work.buffers, work.part);
                merge(work.total, work.part, tile.all_rows(), call.padded_dim());
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
    int64_t rows = 0;
    for (const RowTile& tile : tiles) rows = std::max(rows, tile.all_rows());
    const int64_t floats = RowSums::floats(rows, padded);
    thread_local Scratch partial_scratch;
    auto* partials = partial_scratch.get<float>(tasks.size() * floats * sizeof(float));
    std::atomic<int64_t> next_task{0}, next_tile{0};
    auto body = [&](int, int size) {
        Workspace work(call);
        for (int64_t i; (i = next_task.fetch_add(1)) < static_cast<int64_t>(tasks.size());) {
            const RowTile& tile = tiles[tasks[i].tile];
            gather_queries(call, tile, work.buffers);
            attend_block(call, tile, tasks[i].block, work.buffers,
                         RowSums::at(partials + i * floats, rows, padded));
        }
        barrier(size);
        for (int64_t i; (i = next_tile.fetch_add(1)) < static_cast<int64_t>(tiles.size());) {
            const RowTile& tile = tiles[i];
            clear(work.total, tile.all_rows(), padded);
            for (int64_t b = 0; b < tile.blocks(); ++b) {
                merge(work.total, RowSums::at(partials + (first[i] + b) * floats, rows, padded),
                      tile.all_rows(), padded);
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
    const Plan plan = make_plan(call, sequences, threads);
    if (plan.tiles.empty()) return;
    (plan.split ? run_blocks : run_tiles)(call, plan.tiles, threads);
}
