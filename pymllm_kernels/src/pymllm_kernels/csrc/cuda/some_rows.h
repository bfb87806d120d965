// What some_rows.cu is asked for, and where its blocks keep what in shared memory.

#pragma once

#define PYMLLM_FORMAT 0
#include "few_rows.h"

// Mirrored by `Arguments` in cuda/some_rows_library.py.
struct SomeRowsArguments {
  FewRowsArguments product;  // not used: x_scale, scale, groups, staged, row_tiles, ahead, blocks, closer
  std::int32_t block_k;      // columns of a chunk: 64 or 128
  std::int32_t stages;       // chunks that a block has room for: 2 to MAX_STAGES
  std::int32_t splits;       // blocks of a cluster that share the columns: 1, 2, 4 or 8; below compute capability 9.0: 1
};

namespace {

constexpr int MAX_STAGES = 8, MAX_ROWS = 16, MAX_WARPS = 12;

// Tiles of 16 rows of W that a warp has.
HOST_DEVICE constexpr int row_tiles(bool gated) { return gated ? 2 : 1; }

// A stage holds a chunk of the block's rows of W, of all rows of x and, with a norm, of its weight. Behind the stages:
// sums of squares [split][warp][row of x], the norm's factors [row of x], the barrier of the pushes, and what the other
// blocks of a cluster push into the first one's inbox, [split - 1][piece of a warp's sums][thread] pairs. When the
// chunks are done, the sums [row of x][stride] take the place of the stages.
struct Room {
  int stride;  // floats
  int stage, squares, factors, barrier, inbox, share, total;  // bytes; share: what one block pushes

  HOST_DEVICE Room(int x_tiles, bool gated, int block_k, int warps, int stages, int splits, bool norm) {
    const int width = 16 * row_tiles(gated) * warps, rows = 8 * x_tiles;
    const int pairs = 2 * x_tiles * row_tiles(gated) * 32 * warps * 8, all_squares = norm ? 4 * rows * warps : 0;
    // 4 more than the rows of W, so that the lanes of a warp write to 32 banks.
    stride = width + 4;
    stage = (width + rows + (norm ? 1 : 0)) * 2 * block_k;
    const int ring = stages * stage, sums = 4 * rows * stride;
    squares = ring > sums ? ring : sums;
    factors = squares + splits * all_squares;
    barrier = factors + 4 * rows;
    inbox = barrier + 16;
    share = pairs + all_squares;
    total = inbox + (splits - 1) * pairs;
  }
};

// Where the 16 bytes `piece` of a row lie, so that those of eight rows lie in different banks.
template <int BLOCK_K>
DEVICE int swizzled(int row, int piece) {
  return row * 2 * BLOCK_K + 16 * (piece ^ (row & 7));
}

// Until at most `left` of this thread's groups of copies are on their way: the instruction wants a constant.
DEVICE void wait_for_copies(int left) {
  switch (left) {
    case 0: return copy_wait<0>();
    case 1: return copy_wait<1>();
    case 2: return copy_wait<2>();
    case 3: return copy_wait<3>();
    case 4: return copy_wait<4>();
    case 5: return copy_wait<5>();
    default: return copy_wait<6>();
  }
}
static_assert(MAX_STAGES - 2 == 6);

}  // namespace
