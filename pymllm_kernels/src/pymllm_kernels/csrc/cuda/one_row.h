// One row of x times a weight of bfloat16 or int8 (few_rows.cu): plain multiply-adds keep up with the memory, so that the
// weights may be read in the order in which the memory is fastest, 512 bytes of one row at a time.

#pragma once

#include "staging.h"

namespace {

// A warp has ROWS results at a time, of which the lanes' parts are added at the end. Blocks take turns.
template <int ROWS, bool GATED, int AHEAD>
__global__ void __launch_bounds__(256) one_row_kernel(const __grid_constant__ FewRowsArguments a) {
  constexpr int MATRICES = GATED ? 2 : 1;
  PYMLLM_SHARED(smem);
  launch_dependents();
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int n = static_cast<int>(a.n), k = static_cast<int>(a.k), bytes = k * X_BYTES;
  const int groups = (n + ROWS - 1) / ROWS, stride = gridDim.x * warps;
  const int steps = (bytes + 512 * AHEAD - 1) / (512 * AHEAD) * AHEAD;
  const Layout at = layout_of(k, 1, a.norm != nullptr);
  bring_closer(a.norm, k);
  const char* rows[MATRICES][ROWS];
  bool fetching;
  const auto set_rows = [&](int group) {
    fetching = group < groups;
#pragma unroll
    for (int up = 0; up < MATRICES; up++)
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        rows[up][r] = static_cast<const char*>(a.weight) + (min(group * ROWS + r, n - 1) + up * n) * a.weight_stride;
  };
  uint4 weights[AHEAD][MATRICES][ROWS];
  const auto fetch = [&](int slot, int step) {
    const int offset = 512 * step + 16 * lane;
    if (!fetching || offset >= bytes) return;
#pragma unroll
    for (int up = 0; up < MATRICES; up++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) weights[slot][up][r] = load_once(rows[up][r] + offset);
  };
  int group = blockIdx.x * warps + warp;
  set_rows(group);
#pragma unroll
  for (int slot = 0; slot < AHEAD; slot++) fetch(slot, slot);

  wait_for_previous();
  // While x is on its way the memory would have nothing to do: what registers do not hold, the rest of these rows and
  // the next turn's, goes to the second-level cache.
  const auto bring_rows_closer = [&] {
    for (int offset = 128 * lane; offset < a.closer; offset += 4096) {
      const bool here = 512 * AHEAD + offset < bytes;
      const int turn = group + (here ? 0 : stride), at_byte = 512 * AHEAD + offset - (here ? 0 : max(bytes, 512 * AHEAD));
      if (turn >= groups || at_byte >= bytes) break;
#pragma unroll
      for (int up = 0; up < MATRICES; up++)
#pragma unroll
        for (int r = 0; r < ROWS; r++)
          prefetch_line(static_cast<const char*>(a.weight) + (min(turn * ROWS + r, n - 1) + up * n) * a.weight_stride +
                        at_byte);
    }
  };
  stage<false>(smem, at, static_cast<const char*>(a.x), 0, 1, k, a.norm, bring_rows_closer);
  const float factor = x_factor(smem, at, 0, k, a.norm, a.eps);

  for (; group < groups; group += stride) {
    const Ending<GATED> ending(a, 0, n, lane < ROWS ? group * ROWS + lane : n);
    Sum sums[MATRICES][ROWS];
#pragma unroll
    for (int up = 0; up < MATRICES; up++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) sums[up][r] = 0;
    for (int step = 0; step < steps; step += AHEAD) {
      const bool last = step + AHEAD >= steps;
      if (last) set_rows(group + stride);
#pragma unroll
      for (int slot = 0; slot < AHEAD; slot++) {
        const int offset = 512 * (step + slot) + 16 * lane;
        if (offset < bytes) {
          const uint4 bits = *reinterpret_cast<const uint4*>(smem + offset);
          if constexpr (FORMAT == 1) {
#pragma unroll
            for (int up = 0; up < MATRICES; up++)
#pragma unroll
              for (int r = 0; r < ROWS; r++) {
                const uint4 w = weights[slot][up][r];
                int sum = __dp4a(static_cast<int>(w.x), static_cast<int>(bits.x), sums[up][r]);
                sum = __dp4a(static_cast<int>(w.y), static_cast<int>(bits.y), sum);
                sum = __dp4a(static_cast<int>(w.z), static_cast<int>(bits.z), sum);
                sums[up][r] = __dp4a(static_cast<int>(w.w), static_cast<int>(bits.w), sum);
              }
          } else {
            float value[8], weight[8];
            widen(bits, value);
#pragma unroll
            for (int up = 0; up < MATRICES; up++)
#pragma unroll
              for (int r = 0; r < ROWS; r++) {
                widen(weights[slot][up][r], weight);
#pragma unroll
                for (int i = 0; i < 8; i++) sums[up][r] += weight[i] * value[i];
              }
          }
        }
        fetch(slot, last ? slot : step + slot + AHEAD);
      }
    }
    Sum mine[MATRICES] = {};
#pragma unroll
    for (int up = 0; up < MATRICES; up++)
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        Sum sum = sums[up][r];
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) sum += across(sum, apart);
        if (lane == r) mine[up] = sum;
      }
    ending.write(a, factor, mine[0], mine[MATRICES - 1]);
  }
}

template <int ROWS, bool GATED, int AHEAD>
int run_rows(const FewRowsArguments& a, cudaStream_t stream) {
  const std::int64_t each = static_cast<std::int64_t>(ROWS) * a.warps, blocks = (a.n + each - 1) / each;
  return launch(one_row_kernel<ROWS, GATED, AHEAD>, dim3(static_cast<unsigned>(blocks < a.blocks ? blocks : a.blocks)),
                32 * a.warps, one_row_bytes(a), a.pdl != 0, stream, a);
}

template <bool GATED>
int choose_one_row(const FewRowsArguments& a, cudaStream_t stream) {
  switch (a.row_tiles * 16 + a.ahead) {
    case 16 + 5: return run_rows<1, GATED, 5>(a, stream);
    case 16 + 8: return run_rows<1, GATED, 8>(a, stream);
    case 16 + 10: return run_rows<1, GATED, 10>(a, stream);
    case 32 + 2: return run_rows<2, GATED, 2>(a, stream);
    case 32 + 4: return run_rows<2, GATED, 4>(a, stream);
    case 32 + 5: return run_rows<2, GATED, 5>(a, stream);
    case 32 + 8: return run_rows<2, GATED, 8>(a, stream);
    case 64 + 2: return run_rows<4, GATED, 2>(a, stream);
    case 64 + 4: return run_rows<4, GATED, 4>(a, stream);
    default: return kShape;
  }
}

int run_one_row(const FewRowsArguments& a, cudaStream_t stream) {
  if (a.warps > 8) return kShape;
  return a.gated ? choose_one_row<true>(a, stream) : choose_one_row<false>(a, stream);
}

}  // namespace
