// What the linear nodes of few rows share (few_rows.cu): arguments, instructions, x in shared memory, what follows a product.

#pragma once

#ifdef PYMLLM_EMULATED
#include "emulated_stream.h"
#else
#include "stream.h"
#endif

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifndef PYMLLM_FORMAT
#error "PYMLLM_FORMAT: 0 bfloat16, 1 int8, 2 int4"
#endif
#ifndef PYMLLM_PARTS
#define PYMLLM_PARTS 1  // int4: scales that a row of a unit has; groups have 128 / PARTS columns, or whole units
#endif

// Mirrored by `Arguments` in cuda/few_rows_library.py.
struct FewRowsArguments {
  std::int64_t m, n, k;     // rows of x; results of a row; columns
  const void* x;            // [M, K] bfloat16, or int8 codes where x_scale is given
  std::int64_t x_stride;    // bytes from row to row
  const float* x_scale;     // [M], or null: what the sums of a row are multiplied by, of x that is prepared
  const void* weight;       // [N, K], [2 N, K] where gated: the rows are [gate; up]
  std::int64_t weight_stride;  // bytes
  const void* scale;        // int8: [N] float32. int4: [tiles, G, 16] pairs of bfloat16: scale, -(136 + zero point)
  std::int64_t groups;      // int4: G
  std::int64_t units_per_group;  // int4 with one scale a unit: units that share it
  const float* bias;        // [N] or [2 N], or null
  const void* norm;         // [K] bfloat16, or null
  const void* residual;     // [M, N] bfloat16, or null
  std::int64_t residual_stride;  // elements
  void* out;                // [M, N] without gaps, bfloat16 or float32
  float eps;
  std::int32_t out_float;
  std::int32_t gated;
  std::int32_t staged;      // whether blocks hold x, normed or quantised by themselves, in shared memory: up to 8 rows
  std::int32_t row_tiles;   // 1, 2 or 4 tiles of 16 weight rows a block; of one row of x: results a warp
  std::int32_t ahead;       // of one row of x, unless int4: loads on their way for each result; 0: as for several rows
  std::int32_t warps;       // of a block
  std::int32_t blocks;      // at most, each of which takes tiles in turn
  std::int32_t closer;      // bytes of weights that a warp brings closer for each of its tiles or rows while it waits for x
  std::int32_t pdl;
};

constexpr int kShape = 1;  // returned where no kernel takes the arguments; `launch` says the rest

namespace {

constexpr int FORMAT = PYMLLM_FORMAT;
constexpr int PARTS = PYMLLM_PARTS;
constexpr int UNIT = FORMAT == 0 ? 32 : FORMAT == 1 ? 64 : 128;  // columns
constexpr int X_LOADS = FORMAT == 2 ? 4 : 1;                     // of 16 bytes, for a unit and a row of x
constexpr int X_BYTES = FORMAT == 1 ? 1 : 2;
constexpr int MAX_STAGED = 8;
using Sum = typename std::conditional<FORMAT == 1, int, float>::type;

// Eight bfloat16 numbers as float32.
DEVICE void widen(const uint4& bits, float (&to)[8]) {
  const std::uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// 128 + code of the columns (i, i + 4), i = 0..3, of a word of eight codes, in bfloat16.
DEVICE void bias_codes(std::uint32_t word, std::uint32_t (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) to[i] = and_or<0x000f000f, 0x43004300>(word >> (4 * i));
}

// Eight bfloat16 numbers in the order in which `bias_codes` leaves those of a word: columns (0, 4) (1, 5) (2, 6) (3, 7).
DEVICE uint4 in_fragments(const uint4& bits) {
  return make_uint4(__byte_perm(bits.x, bits.z, 0x5410), __byte_perm(bits.x, bits.z, 0x7632),
                    __byte_perm(bits.y, bits.w, 0x5410), __byte_perm(bits.y, bits.w, 0x7632));
}

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

// What follows a product: scales, bias, SiLU, residual, one rounding. Loads when it is made, so that this can be early.
template <bool GATED>
struct Ending {
  int row, column;
  float x_scale = 1.0f, scale = 1.0f, up_scale = 1.0f, bias = 0.0f, up_bias = 0.0f, residual = 0.0f;

  // index: of the results of a block, which has those from column `first` on, `width` of each row.
  DEVICE Ending(const FewRowsArguments& a, int first, int width, int index)
      : row(index / width), column(first + index % width) {
    const int n = static_cast<int>(a.n);
    if (row >= a.m || column >= n) {
      column = -1;
      return;
    }
    if (a.x_scale != nullptr) x_scale = a.x_scale[row];
    if (FORMAT == 1) {
      const float* scales = static_cast<const float*>(a.scale);
      scale = scales[column];
      if (GATED) up_scale = scales[n + column];
    }
    if (a.bias != nullptr) {
      bias = a.bias[column];
      if (GATED) up_bias = a.bias[n + column];
    }
    if (a.residual != nullptr)
      residual = from_bfloat16(static_cast<const std::uint16_t*>(a.residual)[row * a.residual_stride + column]);
  }

  // factor: of the row of x, where x_scale does not have it.
  DEVICE void write(const FewRowsArguments& a, float factor, Sum sum, Sum up_sum) const {
    if (column < 0) return;
    const auto widened = [&](Sum product, float weight_scale) {
      const float wide = __fmul_rn(static_cast<float>(product), x_scale * factor);
      return FORMAT == 1 ? __fmul_rn(wide, weight_scale) : wide;
    };
    float y = widened(sum, scale) + bias;
    if (GATED) y = y / (1.0f + __expf(-y)) * (widened(up_sum, up_scale) + up_bias);
    y += residual;
    const std::int64_t to = row * a.n + column;
    if (a.out_float)
      static_cast<float*>(a.out)[to] = y;
    else
      static_cast<std::uint16_t*>(a.out)[to] = to_bfloat16(y);
  }
};

}  // namespace
