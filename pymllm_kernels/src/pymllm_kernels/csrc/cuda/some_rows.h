// What some_rows.cu is asked for, and where its blocks keep what in shared memory.

#pragma once

#define PYMLLM_FORMAT 0
#include "few_rows.h"
#include "group.h"

// Mirrored by `Arguments` in cuda/some_rows_library.py.
struct SomeRowsArguments {
  FewRowsArguments product;  // row_tiles: of a warp. Not used: x_scale, scale, groups, staged, ahead, blocks, closer
  std::int32_t block_k;      // columns of a chunk: 64 or 128
  std::int32_t stages;       // chunks that a block has room for: 2 to MAX_STAGES
  std::int32_t splits;       // blocks of a cluster that share the columns: 1, 2, 4 or 8; below compute capability 9.0: 1
};

namespace {

constexpr int MAX_STAGES = 8, MAX_X_TILES = 8, MAX_ROWS = 256;

// What is left of the arguments for the blocks that have the `part`-th 64 rows of x.
DEVICE void take_part(FewRowsArguments& a, int part) {
  const int first = part * 8 * MAX_X_TILES;
  a.m = min(static_cast<int>(a.m) - first, 8 * MAX_X_TILES);
  a.x = static_cast<const char*>(a.x) + first * a.x_stride;
  if (a.residual != nullptr) a.residual = static_cast<const std::uint16_t*>(a.residual) + first * a.residual_stride;
  a.out = static_cast<char*>(a.out) + first * a.n * (a.out_float ? 4 : 2);
}

// Whether groups of four warps multiply together (wgmma). Its operands lie in shared memory as `swizzled<64>` puts them, so
// that x cannot be multiplied by the norm's weight on the way.
HOST_DEVICE constexpr bool in_groups(int x_tiles, bool norm, int block_k) {
  return PYMLLM_WGMMA && x_tiles >= 4 && !norm && block_k == 64;
}

// Fewer where a thread has 64 sums and more: 12 warps have 168 registers each, which would not hold them all.
HOST_DEVICE constexpr int max_warps(int x_tiles, int row_tiles) { return x_tiles * row_tiles >= 16 ? 8 : 12; }

// A stage holds a chunk of the block's rows of W, of all rows of x and, with a norm, of its weight. Behind the stages:
// sums of squares [split][warp][row of x], the norm's factors [row of x], the barrier of the pushes, and what the other
// blocks of a cluster push into the first one's inbox, [split - 1][piece of a warp's sums][thread] pairs. When the
// chunks are done, the sums [row of x][stride] take the place of the stages.
struct Room {
  int stride;  // floats
  int stage, squares, factors, barrier, inbox, share, total;  // bytes; share: what one block pushes

  HOST_DEVICE Room(int x_tiles, int row_tiles, int block_k, int warps, int stages, int splits, bool norm) {
    const int width = 16 * row_tiles * warps, rows = 8 * x_tiles;
    const int pairs = 2 * x_tiles * row_tiles * 32 * warps * 8, all_squares = norm ? 4 * rows * warps : 0;
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
