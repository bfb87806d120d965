// Up to 32 rows of x times a weight of int4, or 8 times one of int8 (few_rows.cu), on the tensor cores.
//
// How the weights fit them (PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k32"): the weights are the left operand, 16
// of their rows a tile, the rows of x the columns of the right one, 8 a tile. A product does not change when its inner
// dimension is permuted on both sides. So the k that a lane owns by the instruction's definition, pairs that lie apart,
// are taken to be neighbours: lane (g, t) holds 16 bytes of row g, 16 of row g + 8, and the same columns of x's row g. A
// unit is what one such pair of loads covers: UNIT columns of 16 rows. Each warp of a block has a run of the units of the
// same rows; their sums are added in shared memory at the end.
//
// int4: word j (of 4) that lane t holds of unit u are the codes of columns 128 u + 32 j + 8 t + (0..7), lowest
// first (`to_tiles` in cuda/int4_tiles.py packs them). `(word >> 4 i) & 0x000f000f | 0x43004300` are the bfloat16
// numbers 128 + code of the columns i and i + 4; x is put in the same order, once where a block holds it, else by each
// warp. The 128 + 8 + zero point that is too much leaves the sums of a group, which its scale multiplies in float32.

#pragma once

#include "multiply_codes.h"
#include "staging.h"

namespace {

constexpr int MAX_CODE_UNITS = 1024;  // of a row of int4

// Few enough that several blocks find registers on a multiprocessor: one computes while another waits.
HOST_DEVICE constexpr int max_warps(int x_tiles, int row_tiles) {
  return x_tiles > 1 || row_tiles == 2 ? 8 : row_tiles == 1 ? 12 : FORMAT == 2 ? 4 : 8;
}

HOST_DEVICE constexpr int least_blocks(int x_tiles, int row_tiles) {
  return x_tiles > 1 ? 1 : FORMAT == 2 && row_tiles == 4 ? 3 : 2;
}

// Units that a warp has on their way: as many as the registers hold.
HOST_DEVICE constexpr int rounds_ahead(int x_tiles, int row_tiles, bool staged) {
  if (PARTS == 4 && x_tiles == 4) return 1;  // a second one would spill 216 bytes
  if (FORMAT == 2) return (row_tiles == 4 || (row_tiles == 1 && !staged) ? 2 : 3) - (PARTS > 1 ? 1 : 0);
  return row_tiles == 1 ? 4 : 2;
}

// X_TILES: tiles of 8 rows of x. ROW_TILES: tiles of 16 rows of W, where gated one half of them gate, one up.
// STAGED, of int4: x lies in shared memory; otherwise it is read from global memory, prepared where it has to be (prepare.h).
template <int X_TILES, int ROW_TILES, bool GATED, bool STAGED>
__global__ void __launch_bounds__(max_warps(X_TILES, ROW_TILES) * 32, least_blocks(X_TILES, ROW_TILES))
    few_rows_kernel(const __grid_constant__ FewRowsArguments a) {
  // Units of weights on their way for each warp.
  constexpr int AHEAD = rounds_ahead(X_TILES, ROW_TILES, STAGED);
  constexpr int X_AHEAD = STAGED || FORMAT == 2 ? 1 : AHEAD;
  constexpr int WIDTH = 16 * ROW_TILES, RESULTS = GATED ? WIDTH / 2 : WIDTH;
  // 4 more than the rows of W, so that the lanes of a warp write to 32 banks.
  constexpr int STRIDE = WIDTH + 4;
  PYMLLM_SHARED(smem);
  launch_dependents();
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int m = static_cast<int>(a.m), n = static_cast<int>(a.n), k = static_cast<int>(a.k), units = k / UNIT;
  const int first = blockIdx.x * RESULTS;
  // The units of this warp lie side by side, so that most addresses differ by constants.
  const int begin = warp * units / warps, end = (warp + 1) * units / warps;
  const Layout at = layout_of(k, STAGED ? m : 0, a.norm != nullptr);
  if (STAGED) bring_closer(a.norm, k);

  // Where this lane's part of the next units of W begins, and of int4 the constants of a tile.
  constexpr int UNIT_BYTES = FORMAT == 2 ? 1024 : 64;
  const char* rows[ROW_TILES][FORMAT == 2 ? 1 : 2];
  const std::uint32_t* constants_of[ROW_TILES];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++) {
    const bool up = GATED && r >= ROW_TILES / 2;
    const int row = first + 16 * (up ? r - ROW_TILES / 2 : r);
    const char* weight = static_cast<const char*>(a.weight) + begin * UNIT_BYTES;
    if constexpr (FORMAT == 2) {
      // Tiles lie one after another, those of up after those of gate, each filled up to 16 rows.
      const std::int64_t tile = min(row, n - 1) / 16 + (up ? (n + 15) / 16 : 0);
      rows[r][0] = weight + tile * units * UNIT_BYTES + lane * 16;
      constants_of[r] = static_cast<const std::uint32_t*>(a.scale) + tile * a.groups * 16 + g;
    } else {
      // Rows after the last are computed for nothing and written nowhere.
#pragma unroll
      for (int half = 0; half < 2; half++)
        rows[r][half] = weight + (min(row + 8 * half + g, n - 1) + (up ? n : 0)) * a.weight_stride + 16 * t;
    }
  }
  // unit / units_per_group is unit * per_unit >> 20: exact while both are at most MAX_CODE_UNITS.
  const int shared_by = static_cast<int>(a.units_per_group);
  const int per_unit = FORMAT == 2 && PARTS == 1 ? ((1 << 20) + shared_by - 1) / shared_by : 0;
  uint4 weights[AHEAD][ROW_TILES][2];
  std::uint32_t constants[AHEAD][ROW_TILES][2][PARTS];
  // The unit that lies `on` after the one to which the pointers point, if it is this warp's.
  const auto fetch = [&](int slot, int at_unit, int on) {
    if (at_unit + on >= end) return;
    const int group = PARTS == 1 ? (at_unit + on) * per_unit >> 20 : (at_unit + on) * PARTS;
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        weights[slot][r][half] =
            load_once(FORMAT == 2 ? rows[r][0] + UNIT_BYTES * on + 512 * half : rows[r][half] + UNIT_BYTES * on);
        if constexpr (FORMAT == 2) {
#pragma unroll
          for (int part = 0; part < PARTS; part++)
            constants[slot][r][half][part] = load_word_once(constants_of[r] + (group + part) * 16 + 8 * half);
        }
      }
    }
  };
#pragma unroll
  for (int slot = 0; slot < AHEAD; slot++) fetch(slot, begin, slot);

  wait_for_previous();
  // While x is on its way the memory would have nothing to do: what registers do not hold goes to the second-level cache.
  const auto bring_units_closer = [&] {
    if constexpr (FORMAT == 2) {
      for (int offset = 128 * lane; offset < a.closer && begin + AHEAD + offset / UNIT_BYTES < end; offset += 4096)
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) prefetch_line(rows[r][0] - 16 * lane + AHEAD * UNIT_BYTES + offset);
    }
  };
  if constexpr (STAGED)
    stage<FORMAT == 2>(smem, at, static_cast<const char*>(a.x), a.x_stride, m, k, a.norm, bring_units_closer);

  // Columns of the product that no row of x belongs to repeat the last one, and are written nowhere.
  const char* x_rows[X_TILES];
#pragma unroll
  for (int c = 0; c < X_TILES; c++) {
    const int row = min(8 * c + g, m - 1);
    x_rows[c] = (STAGED ? smem + row * row_bytes(k) : static_cast<const char*>(a.x) + row * a.x_stride) +
                64 * X_LOADS * begin + 16 * t;
  }
  uint4 x[X_AHEAD][X_TILES][X_LOADS];
  const auto fetch_x = [&](int slot, int at_unit, int on) {
    if (at_unit + on >= end) return;
#pragma unroll
    for (int c = 0; c < X_TILES; c++) {
#pragma unroll
      for (int j = 0; j < X_LOADS; j++) {
        const char* from = x_rows[c] + 64 * X_LOADS * on + 64 * j;
        x[slot][c][j] = STAGED ? *reinterpret_cast<const uint4*>(from) : load_shared_with_others(from);
      }
    }
  };
  if (!STAGED) {
#pragma unroll
    for (int slot = 0; slot < X_AHEAD; slot++) fetch_x(slot, begin, slot);
  }
  const float* group_sums[2];  // of the rows 2 t and 2 t + 1
#pragma unroll
  for (int i = 0; i < 2; i++)
    group_sums[i] = reinterpret_cast<const float*>(smem + at.group_sums) + (min(2 * t + i, m - 1) * units + begin) * PARTS;
  // What the end needs of others is on its way before the product begins.
  const Ending<GATED> ending(a, first, RESULTS, threadIdx.x);

  Sum sums[ROW_TILES][X_TILES][4];
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int c = 0; c < X_TILES; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[r][c][i] = 0;

  for (int unit = begin; unit < end; unit += AHEAD) {
#pragma unroll
    for (int slot = 0; slot < AHEAD; slot++) {
      const int x_slot = slot % X_AHEAD;
      if (unit + slot >= end) break;
      if (STAGED) fetch_x(0, unit, slot);
      if constexpr (FORMAT != 2) {
#pragma unroll
        for (int c = 0; c < X_TILES; c++) {
          const uint4 b = x[x_slot][c][0];
#pragma unroll
          for (int r = 0; r < ROW_TILES; r++) {
            const uint4 low = weights[slot][r][0], high = weights[slot][r][1];
            multiply(sums[r][c], low.x, high.x, low.y, high.y, b.x, b.y);
            multiply(sums[r][c], low.z, high.z, low.w, high.w, b.z, b.w);
          }
        }
      } else {
        float staged_sums[PARTS][2];
#pragma unroll
        for (int i = 0; i < 2 * PARTS; i++)
          staged_sums[i / 2][i % 2] = STAGED ? group_sums[i % 2][slot * PARTS + i / 2] : 0.0f;
        multiply_codes<ROW_TILES, X_TILES, STAGED>(sums, weights[slot], constants[slot], x[x_slot], staged_sums);
      }
      fetch(slot, unit, slot + AHEAD);
      if (!STAGED) fetch_x(x_slot, unit, slot + X_AHEAD);
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
      for (int half = 0; half < (FORMAT == 2 ? 1 : 2); half++) rows[r][half] += AHEAD * UNIT_BYTES;
#pragma unroll
    for (int c = 0; c < X_TILES; c++) x_rows[c] += AHEAD * 64 * X_LOADS;
    group_sums[0] += AHEAD * PARTS;
    group_sums[1] += AHEAD * PARTS;
  }

  Sum* all = reinterpret_cast<Sum*>(smem + at.sums);  // [warps][rows of x][STRIDE]
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int c = 0; c < X_TILES; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = 8 * c + 2 * t + i % 2;
        if (row < m) all[(warp * m + row) * STRIDE + 16 * r + 8 * (i / 2) + g] = sums[r][c][i];
      }
  sync_block();
  const auto add_up = [&](int row, int place) {
    Sum sum = 0;
    for (int w = 0; w < warps; w++) sum += all[(w * m + row) * STRIDE + place];
    return sum;
  };
  for (int index = threadIdx.x; index < m * RESULTS; index += blockDim.x) {
    const int row = index / RESULTS, place = index % RESULTS;
    const float factor = STAGED ? x_factor(smem, at, row, k, a.norm, a.eps) : 1.0f;
    const Ending<GATED> now = index == threadIdx.x ? ending : Ending<GATED>(a, first, RESULTS, index);
    now.write(a, factor, add_up(row, place), GATED ? add_up(row, WIDTH / 2 + place) : Sum(0));
  }
}

int tiles_bytes(const FewRowsArguments& a) {
  const int m = static_cast<int>(a.m);
  return layout_of(static_cast<int>(a.k), a.staged ? m : 0, a.norm != nullptr).sums +
         a.warps * m * (16 * a.row_tiles + 4) * 4;
}

template <int X_TILES, int ROW_TILES, bool GATED, bool STAGED>
int run(const FewRowsArguments& a, cudaStream_t stream) {
  if (a.warps > max_warps(X_TILES, ROW_TILES)) return kShape;
  constexpr int RESULTS = (GATED ? 8 : 16) * ROW_TILES;
  const std::int64_t tiles = (a.n + RESULTS - 1) / RESULTS;
  return launch(few_rows_kernel<X_TILES, ROW_TILES, GATED, STAGED>, dim3(static_cast<unsigned>(tiles)), 32 * a.warps,
                tiles_bytes(a), a.pdl != 0, stream, a);
}

template <int X_TILES, bool STAGED>
int choose(const FewRowsArguments& a, cudaStream_t stream) {
  switch (a.row_tiles * 2 + (a.gated ? 1 : 0)) {
    case 2: return run<X_TILES, 1, false, STAGED>(a, stream);
    case 4: return run<X_TILES, 2, false, STAGED>(a, stream);
    case 5: return run<X_TILES, 2, true, STAGED>(a, stream);
    default: break;
  }
  // The registers do not hold more of int4.
  if constexpr (FORMAT != 2 || X_TILES < 4) {
    if (a.row_tiles == 4) return a.gated ? run<X_TILES, 4, true, STAGED>(a, stream) : run<X_TILES, 4, false, STAGED>(a, stream);
  }
  return kShape;
}

int run_tiles(const FewRowsArguments& a, cudaStream_t stream) {
  if constexpr (FORMAT == 2) {
    if (a.k / UNIT > MAX_CODE_UNITS) return kShape;
    if (a.staged) return a.m <= MAX_STAGED ? choose<1, true>(a, stream) : kShape;
    if (a.m > 8) return a.m <= 16 ? choose<2, false>(a, stream) : a.m <= 32 ? choose<4, false>(a, stream) : kShape;
  }
  return a.staged || a.m > 8 ? kShape : choose<1, false>(a, stream);
}

}  // namespace
