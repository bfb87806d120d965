// Rows of x in shared memory, as the linear nodes of few rows (one_row.h, prepare.h, tiles.h) read them.

#pragma once

#include "few_rows.h"

namespace {

HOST_DEVICE constexpr int row_bytes(int k) {
  // Rows 64 bytes past a multiple of 128, so that two of them lie in different banks.
  return k * X_BYTES + ((k * X_BYTES / 64) % 2 == 0 ? 64 : 0);
}

// Where a block keeps what in shared memory: x as the products read it, x as it came, the norm's weight, sums of x by
// groups, what the norm needs, sums of the product.
struct Layout {
  int raw, gain, group_sums, scales, sums, total;
};

HOST_DEVICE Layout layout_of(int k, int rows, bool norm) {
  const bool staged = rows > 0;
  Layout at;
  at.raw = rows * row_bytes(k);
  at.gain = at.raw + (FORMAT == 1 ? rows * 2 * k : 0);
  at.group_sums = at.gain + (FORMAT == 1 && staged && norm ? 2 * k : 0);
  at.scales = at.group_sums + (FORMAT == 2 ? (rows * (k / UNIT) * PARTS * 4 + 15) / 16 * 16 : 0);
  at.sums = at.scales + (staged ? 4 * MAX_STAGED + 2 * 4 * 32 * MAX_STAGED : 0);
  at.total = at.sums;
  return at;
}

// Bytes of shared memory that a block needs for one row of x.
int one_row_bytes(const FewRowsArguments& a) { return layout_of(static_cast<int>(a.k), 1, a.norm != nullptr).total; }

// The norm's weight is no other kernel's work: it comes closer before the wait. Not further than the second-level cache:
// copies into shared memory (cp.async) or registers would arrive behind the weights, and be waited for.
DEVICE void bring_closer(const void* norm, int k) {
  if (norm == nullptr) return;
  for (int line = threadIdx.x; line * 64 < k; line += blockDim.x) prefetch_line(static_cast<const char*>(norm) + 128 * line);
}

// Where `stage` puts a row, and what of it the threads have found out.
struct Staging {
  char* smem;
  Layout at;
  int k, row;
  float sum = 0.0f, top = 0.0f;  // of squares; the largest magnitude
};

// A row of x, HELD chunks of 16 bytes a thread at a time; `from` is its begin. meanwhile: what can be done until they come.
template <bool TILED, bool NORM, class Meanwhile>
DEVICE void take_row(Staging& to, const char* from, const void* norm, const Meanwhile& meanwhile) {
  constexpr int HELD = NORM ? 2 : FORMAT == 2 ? 4 : 6;
  const int threads = blockDim.x, thread = threadIdx.x, chunks = to.k / 8;
  char* row = FORMAT == 1 ? to.smem + to.at.raw + to.row * 2 * to.k : to.smem + to.row * row_bytes(to.k);
  for (int base = 0; base < chunks; base += HELD * threads) {
    // Through registers: copies into shared memory past them (cp.async) took 1 to 5 us longer on an H200.
    uint4 held[HELD], gain[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      const int chunk = base + i * threads + thread;
      held[i] = gain[i] = make_uint4(0, 0, 0, 0);
      if (chunk >= chunks) continue;
      held[i] = load_shared_with_others(from + 16 * chunk);
      if (NORM) gain[i] = load_once(static_cast<const char*>(norm) + 16 * chunk);
    }
    if (to.row == 0 && base == 0) meanwhile();
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      const int chunk = base + i * threads + thread;
      if (chunk - thread >= chunks) break;  // for all threads: the lanes of a warp stay together
      uint4 bits = held[i];
      float value[8], factor[8];
      widen(bits, value);
      if (NORM) {
        widen(gain[i], factor);
#pragma unroll
        for (int n = 0; n < 8; n++) {
          to.sum += value[n] * value[n];
          value[n] = __fmul_rn(value[n], factor[n]);
        }
        if (FORMAT != 1)
          bits = make_uint4(pack(value[0], value[1]), pack(value[2], value[3]), pack(value[4], value[5]),
                            pack(value[6], value[7]));
      }
      if (FORMAT == 1) {
#pragma unroll
        for (int n = 0; n < 8; n++) to.top = fmaxf(to.top, fabsf(value[n]));
        if (NORM && chunk < chunks) *reinterpret_cast<uint4*>(to.smem + to.at.gain + 16 * chunk) = gain[i];
      }
      if (TILED) {
        constexpr int LANES = 16 / PARTS;  // whose columns share a scale
        float total = 0.0f;
        widen(bits, value);
#pragma unroll
        for (int n = 0; n < 8; n++) total += value[n];
#pragma unroll
        for (int lane = 1; lane < LANES; lane *= 2) total += across(total, lane);
        if (chunk < chunks && thread % LANES == 0)
          reinterpret_cast<float*>(to.smem + to.at.group_sums)[to.row * (to.k / UNIT) * PARTS + chunk / LANES] = total;
        bits = in_fragments(bits);
      }
      if (chunk < chunks) *reinterpret_cast<uint4*>(row + 16 * chunk) = bits;
    }
  }
}

// A row that `take_row` has left in shared memory to codes, each thread what it has put there: no barrier is needed.
DEVICE void quantise_row(char* smem, const Layout& at, int row, int k, const void* norm, float top) {
  // As torch does it, in two steps: ties are decided by the last bit.
  const float factor = __fmul_rn(__fdiv_rn(1.0f, top > 0.0f ? top : 1.0f), 127.0f);
  for (int chunk = threadIdx.x; chunk < k / 8; chunk += blockDim.x) {
    float value[8], weight[8];
    widen(*reinterpret_cast<const uint4*>(smem + at.raw + row * 2 * k + 16 * chunk), value);
    if (norm != nullptr) widen(*reinterpret_cast<const uint4*>(smem + at.gain + 16 * chunk), weight);
    std::uint32_t codes[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float wide = norm == nullptr ? value[i] : __fmul_rn(value[i], weight[i]);
      const int code = max(-128, min(127, __float2int_rn(__fmul_rn(wide, factor))));
      codes[i / 4] |= static_cast<std::uint32_t>(code & 0xff) << (8 * (i % 4));
    }
    *reinterpret_cast<uint2*>(smem + row * row_bytes(k) + 8 * chunk) = make_uint2(codes[0], codes[1]);
  }
}

// Rows of x, times the norm's weight, quantised, into shared memory. Ends with a barrier.
//
// The norm's factor is left to the end of the product (`x_factor`): so nothing waits for all of a row, unless it is
// quantised, and a row's codes do not change when the row is scaled. TILED, of int4: columns in the order of the
// fragments, and the sums of x by groups.
template <bool TILED, class Meanwhile>
DEVICE void stage(char* smem, const Layout& at, const char* x, std::int64_t stride, int rows, int k, const void* norm,
                  const Meanwhile& meanwhile) {
  float* scales = reinterpret_cast<float*>(smem + at.scales);
  float* parts = scales + MAX_STAGED;  // [2][32 warps][MAX_STAGED]
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  for (int row = 0; row < rows; row++) {
    Staging to{smem, at, k, row};
    if (norm != nullptr)
      take_row<TILED, true>(to, x + row * stride, norm, meanwhile);
    else
      take_row<TILED, false>(to, x + row * stride, norm, meanwhile);
    if (FORMAT != 1 && norm == nullptr) continue;
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
      to.sum += across(to.sum, lane);
      if (FORMAT == 1) to.top = fmaxf(to.top, across(to.top, lane));
    }
    if (threadIdx.x % 32 == 0) {
      parts[warp * MAX_STAGED + row] = to.sum;
      parts[(32 + warp) * MAX_STAGED + row] = to.top;
    }
  }
  sync_block();
  if constexpr (FORMAT == 1) {
    for (int row = 0; row < rows; row++) {
      float top = 0.0f;
      for (int w = 0; w < warps; w++) top = fmaxf(top, parts[(32 + w) * MAX_STAGED + row]);
      if (threadIdx.x == 0) scales[row] = __fdiv_rn(top, 127.0f);
      quantise_row(smem, at, row, k, norm, top);
    }
    sync_block();
  }
}

// What the sums of a staged row are multiplied by: the norm's factor, and what the row was divided by.
DEVICE float x_factor(const char* smem, const Layout& at, int row, int k, const void* norm, float eps) {
  const float* scales = reinterpret_cast<const float*>(smem + at.scales);
  float factor = 1.0f;
  if (norm != nullptr) {
    float sum = 0.0f;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; warp++) sum += scales[(1 + warp) * MAX_STAGED + row];
    factor = inverse_root(sum / k + eps);
  }
  return FORMAT == 1 ? __fmul_rn(scales[row], factor) : factor;
}

}  // namespace
