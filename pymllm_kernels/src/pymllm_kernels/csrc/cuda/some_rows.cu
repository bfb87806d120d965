// Linear nodes of some rows: y = act(norm(x) · W^T + bias) + residual for up to 16 rows of x in bfloat16, one launch.
//
// Still bound by reading W, but with too many rows of x to read them anew for every 16 rows of W, as tiles.h does.
// So a block of several warps goes through the columns in chunks, and what it needs of x is read once for all of its
// rows of W. Chunks of W and x stream through a ring of stages in shared memory (cp.async), in whole lines of 128 or
// 256 bytes, swizzled so that ldmatrix meets no bank twice. The weights of the first chunks are asked for before the
// kernel that makes x has finished (programmatic dependent launch).
//
// The weights are the left operand of mma.m16n8k16, 16 of their rows a tile, the rows of x the columns of the right one,
// 8 a tile. Each warp has rows of W of its own and all rows of x. Where there are too few rows of W for all
// multiprocessors, the blocks of a cluster share the columns: the others push their sums into the shared memory of the
// first one, which adds them in the order of the blocks, so that the bits are the same every time.
//
// The norm's factor is left to the end (as in staging.h). Its sums of squares are the diagonal of x · x^T, a tile at a
// time: one instruction of the tensor cores, whose operands are there anyway.

#include "some_rows.h"

namespace {

// Two neighbouring results: in one store where each row has an even number of them.
template <bool GATED>
DEVICE void write_pair(const FewRowsArguments& a, const Ending<GATED> (&of)[2], float factor, float2 sum, float2 up) {
  if (of[1].column < 0 || a.n % 2) {
    of[0].write(a, factor, sum.x, up.x);
    of[1].write(a, factor, sum.y, up.y);
    return;
  }
  const float2 y = make_float2(of[0].result(factor, sum.x, up.x), of[1].result(factor, sum.y, up.y));
  const std::int64_t to = of[0].row * a.n + of[0].column;
  if (a.out_float)
    *reinterpret_cast<float2*>(static_cast<float*>(a.out) + to) = y;
  else
    *reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(a.out) + to) = pack(y.x, y.y);
}

// X_TILES: tiles of 8 rows of x. A warp has a tile of 16 rows of W, where gated one of gate and one of up. BLOCK_K: columns
// of a chunk.
template <int X_TILES, bool GATED, bool NORM, int BLOCK_K>
__global__ void __launch_bounds__(MAX_WARPS * 32, 1)
    some_rows_kernel(const __grid_constant__ SomeRowsArguments arguments) {
  const FewRowsArguments& a = arguments.product;
  constexpr int ROW_TILES = row_tiles(GATED), ROW_BYTES = 2 * BLOCK_K, PIECES = BLOCK_K / 8, LINES = 32 / PIECES;
  constexpr int ROWS = 8 * X_TILES, WIDTH = 16 * ROW_TILES, RESULTS = 16;  // of a warp
  PYMLLM_SHARED(smem);
  launch_dependents();
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int m = static_cast<int>(a.m), n = static_cast<int>(a.n), k = static_cast<int>(a.k);
  const int stages = arguments.stages, splits = arguments.splits;
  const int rank = blockIdx.x % splits, tile = blockIdx.x / splits, chunks = k / BLOCK_K;
  const int begin = rank * chunks / splits, count = (rank + 1) * chunks / splits - begin;
  const Room at(X_TILES, GATED, BLOCK_K, warps, stages, splits, NORM);
  std::uint64_t* const pushed = reinterpret_cast<std::uint64_t*>(smem + at.barrier);
  if (splits > 1) {
    if (rank == 0 && threadIdx.x == 0) expect_pushes(pushed, (splits - 1) * at.share);
    arrive_begun();
  }

  // Neighbouring lanes take neighbouring pieces of 16 bytes of a row: LINES rows at a time.
  const int line = lane / PIECES, piece = lane % PIECES;
  const int first = (tile * warps + warp) * RESULTS, left = n - first - line;
  const auto stride = static_cast<std::uint32_t>(a.weight_stride);
  const char* weight = static_cast<const char*>(a.weight) + static_cast<std::int64_t>(first + line) * stride +
                       begin * ROW_BYTES + 16 * piece;
  const std::int64_t to_up = static_cast<std::int64_t>(n) * stride;
  const char* gain = static_cast<const char*>(a.norm) + begin * ROW_BYTES + 16 * threadIdx.x;
  const int x_at = warps * WIDTH * ROW_BYTES, gain_at = x_at + ROWS * ROW_BYTES;
  // The next chunk of W. Rows after the last are zeros and are not read.
  const auto fetch_weights = [&](char* stage) {
    char* const to = stage + (warp * WIDTH + line) * ROW_BYTES;
#pragma unroll
    for (int i = 0; i < WIDTH; i += LINES) {
      const bool up = GATED && i >= RESULTS;
      const int row = up ? i - RESULTS : i;
      // As `swizzled`, of row i + line.
      copy_async(to + i * ROW_BYTES + (16 * (piece ^ line) ^ 16 * (i & 7)),
                 weight + (up ? to_up : 0) + static_cast<std::uint64_t>(row) * stride, row < left);
    }
    weight += ROW_BYTES;
    if (NORM && threadIdx.x < PIECES) copy_async(stage + gain_at + 16 * threadIdx.x, gain, true);
    gain += ROW_BYTES;
  };
  for (int stage = 0; stage < stages - 1; stage++) {
    if (stage < count) fetch_weights(smem + stage * at.stage);
    copy_commit();
  }

  wait_for_previous();
  if (splits > 1) wait_begun();
  // Columns of the product that no row of x belongs to are computed from what lies there, and written nowhere.
  const int x_row = threadIdx.x / PIECES, x_rows = blockDim.x / PIECES;
  const char* x = static_cast<const char*>(a.x) + begin * ROW_BYTES + 16 * piece;
  // x of these chunks through registers: copies would arrive behind all of the weights above.
  for (int row = x_row; row < m; row += x_rows) {
    uint4 held[MAX_STAGES - 1];
#pragma unroll
    for (int stage = 0; stage < MAX_STAGES - 1; stage++)
      if (stage < stages - 1 && stage < count)
        held[stage] = load_shared_with_others(x + row * a.x_stride + stage * ROW_BYTES);
#pragma unroll
    for (int stage = 0; stage < MAX_STAGES - 1; stage++)
      if (stage < stages - 1 && stage < count)
        *reinterpret_cast<uint4*>(smem + stage * at.stage + x_at + swizzled<BLOCK_K>(row, piece)) = held[stage];
  }
  x += (stages - 1) * ROW_BYTES;
  const auto fetch_x = [&](char* stage) {
    for (int row = x_row; row < m; row += x_rows)
      copy_async(stage + x_at + swizzled<BLOCK_K>(row, piece), x + row * a.x_stride, true);
    x += ROW_BYTES;
  };

  float sums[ROW_TILES][X_TILES][4] = {}, squares[NORM ? X_TILES : 1][4] = {};
  // The warps share the squares of a chunk: bit i, of the i-th 32 columns of 8 rows of x.
  std::uint32_t own_squares = 0;
  if (NORM)
    for (int i = warp; i < X_TILES * BLOCK_K / 32; i += warps) own_squares |= 1u << i;
  const int a_row = warp * WIDTH + lane % 16, b_row = lane % 8;
  for (int chunk = 0, slot = 0, free = stages - 1; chunk < count; chunk++) {
    wait_for_copies(stages - 2);
    sync_block();  // the chunk is there for all, and all are done with the one before
    if (chunk + stages - 1 < count) {
      fetch_weights(smem + free * at.stage);
      fetch_x(smem + free * at.stage);
    }
    copy_commit();
    const char* const stage = smem + slot * at.stage;
    slot = slot + 1 == stages ? 0 : slot + 1;
    free = free + 1 == stages ? 0 : free + 1;
#pragma unroll
    for (int j = 0; j < BLOCK_K / 32; j++) {
      std::uint32_t w[ROW_TILES][2][4], by[4];
#pragma unroll
      for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          load_matrices(w[r][half], stage + 16 * r * ROW_BYTES + swizzled<BLOCK_K>(a_row, 4 * j + 2 * half + lane / 16));
      if (NORM)
#pragma unroll
        for (int i = 0; i < 4; i++)
          by[i] = *reinterpret_cast<const std::uint32_t*>(stage + gain_at + 64 * j + 16 * i + 4 * t);
#pragma unroll
      for (int c = 0; c < X_TILES; c++) {
        std::uint32_t b[4];
        load_matrices(b, stage + x_at + 8 * c * ROW_BYTES + swizzled<BLOCK_K>(b_row, 4 * j + lane / 8));
        if constexpr (NORM) {
          if (own_squares >> (j * X_TILES + c) & 1) {
            multiply(squares[c], b[0], 0, b[1], 0, b[0], b[1]);
            multiply(squares[c], b[2], 0, b[3], 0, b[2], b[3]);
          }
#pragma unroll
          for (int i = 0; i < 4; i++) b[i] = multiply_pair(b[i], by[i]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int r = 0; r < ROW_TILES; r++)
            multiply(sums[r][c], w[r][half][0], w[r][half][1], w[r][half][2], w[r][half][3], b[2 * half], b[2 * half + 1]);
      }
    }
  }

  float* const all_squares = reinterpret_cast<float*>(smem + at.squares);
  if constexpr (NORM) {
    // Lane (g, t) has rows g, columns 2 t and 2 t + 1 of x · x^T: the diagonal is in those with t = g / 2.
#pragma unroll
    for (int c = 0; c < X_TILES; c++) {
      const float mine = g % 2 ? squares[c][1] : squares[c][0], next = across(mine, 4);
      float* const to = all_squares + (rank * warps + warp) * ROWS + 8 * c + g;
      if (g % 2 || t != g / 2) continue;
      if (rank == 0)
        *reinterpret_cast<float2*>(to) = make_float2(mine, next);
      else
        push(to, make_float2(mine, next), pushed);
    }
  }
  // The pair of sums `i` of this thread in the inbox.
  constexpr int PAIRS = 2 * ROW_TILES * X_TILES;
  const auto place_of = [&](int split, int i) {
    return reinterpret_cast<float*>(smem + at.inbox) + 2 * (((split - 1) * PAIRS + i) * blockDim.x + threadIdx.x);
  };
  const auto pair = [&](int i) { return &sums[i / 2 / X_TILES][i / 2 % X_TILES][i % 2 * 2]; };
  if (rank != 0) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) push(place_of(rank, i), make_float2(pair(i)[0], pair(i)[1]), pushed);
    return;
  }
  if (splits > 1) {
    wait_pushes(pushed);
    for (int split = 1; split < splits; split++)
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        const float2 other = *reinterpret_cast<const float2*>(place_of(split, i));
        pair(i)[0] += other.x;
        pair(i)[1] += other.y;
      }
  }

  sync_block();  // all are done with the stages
  float* const all = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int c = 0; c < X_TILES; c++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        all[(8 * c + 2 * t + i % 2) * at.stride + warp * WIDTH + 16 * r + 8 * (i / 2) + g] = sums[r][c][i];
  float* const factors = reinterpret_cast<float*>(smem + at.factors);
  if (NORM) {
    for (int row = threadIdx.x; row < m; row += blockDim.x) {
      float sum = 0.0f;
      for (int i = 0; i < splits * warps; i++) sum += all_squares[i * ROWS + row];
      factors[row] = inverse_root(sum / k + a.eps);
    }
  }
  sync_block();

  // A thread has pairs of neighbouring results of every STEP-th row: so many rows of pairs have the block's threads.
  constexpr int STEP = 64 / RESULTS, PLACES = ROWS / STEP;
  const int wide = RESULTS * warps / 2, place = 2 * (threadIdx.x % wide), column = tile * warps * RESULTS + place;
  const int from = GATED ? place / RESULTS * WIDTH + place % RESULTS : place, top = threadIdx.x / wide;
  Ending<GATED> endings[PLACES][2];  // all loads are on their way before one is waited for
#pragma unroll
  for (int i = 0; i < 2 * PLACES; i++) endings[i / 2][i % 2] = Ending<GATED>(a, top + i / 2 * STEP, column + i % 2);
#pragma unroll
  for (int i = 0; i < PLACES; i++) {
    const int row = top + i * STEP;
    if (row >= m) break;
    const float* const of = all + row * at.stride + from;
    const float2 sum = *reinterpret_cast<const float2*>(of);
    const float2 up = GATED ? *reinterpret_cast<const float2*>(of + RESULTS) : sum;
    write_pair(a, endings[i], NORM ? factors[row] : 1.0f, sum, up);
  }
}

template <int X_TILES, bool GATED, bool NORM, int BLOCK_K>
int run(const SomeRowsArguments& arguments, cudaStream_t stream) {
  const FewRowsArguments& a = arguments.product;
  const Room at(X_TILES, GATED, BLOCK_K, a.warps, arguments.stages, arguments.splits, NORM);
  const std::int64_t results = 16 * a.warps, blocks = (a.n + results - 1) / results;
  return launch_clusters(some_rows_kernel<X_TILES, GATED, NORM, BLOCK_K>,
                         dim3(static_cast<unsigned>(blocks * arguments.splits)), arguments.splits, 32 * a.warps, at.total,
                         a.pdl != 0, stream, arguments);
}

template <int X_TILES, bool GATED>
int choose(const SomeRowsArguments& a, cudaStream_t stream) {
  if (a.product.norm != nullptr)
    return a.block_k == 64 ? run<X_TILES, GATED, true, 64>(a, stream) : run<X_TILES, GATED, true, 128>(a, stream);
  return a.block_k == 64 ? run<X_TILES, GATED, false, 64>(a, stream) : run<X_TILES, GATED, false, 128>(a, stream);
}

}  // namespace

PYMLLM_EXPORT int pymllm_some_rows(const SomeRowsArguments* a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto m = a->product.m, stride = a->product.weight_stride;
  const int splits = a->splits;
  if ((a->block_k != 64 && a->block_k != 128) || a->product.k % a->block_k || stride % 16 || stride >= 1ll << 32)
    return kShape;
  if (a->stages < 2 || a->stages > MAX_STAGES || splits < 1 || splits > 8 || splits & (splits - 1)) return kShape;
  if (m < 1 || m > MAX_ROWS || a->product.warps < 1 || a->product.warps > MAX_WARPS) return kShape;
  if (m <= 8) return a->product.gated ? choose<1, true>(*a, on) : choose<1, false>(*a, on);
  return a->product.gated ? choose<2, true>(*a, on) : choose<2, false>(*a, on);
}

// Bytes of shared memory of a block, by m, norm, gated and warps of the product, block_k, stages and splits.
PYMLLM_EXPORT int pymllm_some_rows_shared_memory(const SomeRowsArguments* a) {
  const FewRowsArguments& of = a->product;
  return Room(of.m <= 8 ? 1 : 2, of.gated, a->block_k, of.warps, a->stages, a->splits, of.norm != nullptr).total;
}
