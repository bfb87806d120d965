// What many_rows.cu is asked for, and where its blocks keep what in shared memory.

#pragma once

#define PYMLLM_FORMAT 0
#include "few_rows.h"

#ifdef PYMLLM_EMULATED
#include "emulated_hopper.h"
#else
#include "hopper.h"
#endif

// Mirrored by `Arguments` in cuda/many_rows_library.py.
struct ManyRowsArguments {
  FewRowsArguments product;  // not used: x_scale, scale, groups, norm, staged, row_tiles, ahead, warps, blocks, closer
  std::int32_t x_rows;       // rows of x that a block has: 8, 16, 32, 64 or 128
  std::int32_t groups;       // of four warps with 64 rows of W each, that a block has: 1 or 2
  std::int32_t stages;       // chunks of columns that a block has room for: 2 to MAX_STAGES
  std::int32_t splits;       // blocks of a cluster that share the columns: 1, 2, 4 or 8
};

namespace {

constexpr int MAX_STAGES = 12, GROUP_ROWS = 64, GROUP_THREADS = 128, ROW_BYTES = 2 * TILE_COLUMNS;
constexpr int TILES = 2, CHUNK = TILES * TILE_COLUMNS;  // columns of a chunk: whole lines of 256 bytes

// A stage holds a chunk of the block's rows of W, tile by tile, and then of its rows of x. When the chunks are done, the sums
// [row of x][stride] take the place of the stages. Behind them: what the other blocks push, [split - 1][pair of a thread's
// sums][thread] pairs, and the barriers: a stage is full, a stage is free, all is pushed.
struct Room {
  int stride;  // floats
  int weights, stage, inbox, share, barriers, total;  // bytes; weights: of a stage; share: of what one block pushes

  HOST_DEVICE Room(int x_rows, int groups, int stages, int splits) {
    const int width = GROUP_ROWS * groups;
    // 4 more than the rows of W, so that the lanes of a warp write to 32 banks.
    stride = width + 4;
    weights = TILES * width * ROW_BYTES;
    stage = weights + TILES * x_rows * ROW_BYTES;
    const int ring = stages * stage, sums = 4 * x_rows * stride;
    inbox = ring > sums ? ring : sums;
    share = 4 * x_rows * width;
    barriers = inbox + (splits - 1) * share;
    total = barriers + 8 * (2 * stages + 1);
  }
};

}  // namespace
