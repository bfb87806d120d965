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
  const float* x_scale;     // [M], int8 only: x is quantised already
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

HOST_DEVICE constexpr int row_bytes(int k) {
  // Rows 64 bytes past a multiple of 128, so that two of them lie in different banks.
  return k * X_BYTES + ((k * X_BYTES / 64) % 2 == 0 ? 64 : 0);
}

// Where a block keeps what in shared memory: x as the products read it, x as it came, the norm's weight, sums.
struct Layout {
  int raw, gain, scales, sums, total;
};

HOST_DEVICE Layout layout_of(int k, int rows, bool norm) {
  const bool staged = rows > 0;
  Layout at;
  at.raw = rows * row_bytes(k);
  at.gain = at.raw + (FORMAT == 1 ? rows * 2 * k : 0);
  at.scales = at.gain + (staged && norm ? 2 * k : 0);
  at.sums = at.scales + (staged ? 4 * MAX_STAGED + 2 * 4 * 32 * MAX_STAGED : 0);
  at.total = at.sums;
  return at;
}

// Rows of x, normed and quantised, into shared memory. Ends with a barrier.
//
// A row's codes do not change when the row is scaled, so the norm's factor enters the scale only (as in
// triton/quantize.py). Where nothing is quantised the normed row is rounded before the norm's weight multiplies
// it, as `nn.ops.rms_norm` defines.
DEVICE void stage(char* smem, const Layout& at, const char* x, std::int64_t stride, int rows, int k, const void* norm,
                  float eps) {
  const int threads = blockDim.x, warps = threads / 32, thread = threadIdx.x, chunks = k / 8;
  const uint4* gain = reinterpret_cast<const uint4*>(smem + at.gain);
  char* raw = FORMAT == 1 ? smem + at.raw : smem;
  const int raw_stride = FORMAT == 1 ? 2 * k : row_bytes(k);
  float* parts = reinterpret_cast<float*>(smem + at.scales) + MAX_STAGED;  // [2][32 warps][MAX_STAGED]
  for (int row = 0; row < rows; row++) {
    float sum = 0.0f, top = 0.0f;
    const auto take = [&](int chunk, const uint4& bits) {
      *reinterpret_cast<uint4*>(raw + row * raw_stride + 16 * chunk) = bits;
      float value[8], factor[8];
      if (FORMAT == 1 || norm != nullptr) widen(bits, value);
      if (norm != nullptr) {
        if (FORMAT == 1) widen(gain[chunk], factor);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += value[i] * value[i];
      }
      if (FORMAT == 1) {
#pragma unroll
        for (int i = 0; i < 8; i++) top = fmaxf(top, fabsf(norm == nullptr ? value[i] : value[i] * factor[i]));
      }
    };
    // Through registers: copies into shared memory past them (cp.async) took 1 to 5 us longer on an H200.
    for (int chunk = thread; chunk < chunks; chunk += 2 * threads) {
      const char* from = x + row * stride + 16 * chunk;
      const bool both = chunk + threads < chunks;
      const uint4 bits = load_shared_with_others(from);
      const uint4 more = both ? load_shared_with_others(from + 16 * threads) : bits;
      take(chunk, bits);
      if (both) take(chunk + threads, more);
    }
    if (FORMAT == 1 || norm != nullptr) {
#pragma unroll
      for (int lane = 16; lane > 0; lane /= 2) {
        sum += across(sum, lane);
        if (FORMAT == 1) top = fmaxf(top, across(top, lane));
      }
      if (thread % 32 == 0) {
        parts[thread / 32 * MAX_STAGED + row] = sum;
        parts[(32 + thread / 32) * MAX_STAGED + row] = top;
      }
    }
  }
  if (FORMAT == 1 || norm != nullptr) {
    sync_block();
    float* scales = reinterpret_cast<float*>(smem + at.scales);
    for (int row = 0; row < rows; row++) {
      float sum = 0.0f, top = 0.0f;
      for (int warp = 0; warp < warps; warp++) {
        sum += parts[warp * MAX_STAGED + row];
        if (FORMAT == 1) top = fmaxf(top, parts[(32 + warp) * MAX_STAGED + row]);
      }
      const float rms_inverse = norm == nullptr ? 1.0f : inverse_root(sum / k + eps);
      // As torch does it, in two steps: ties are decided by the last bit.
      const float factor = __fmul_rn(__fdiv_rn(1.0f, top > 0.0f ? top : 1.0f), 127.0f);
      if (FORMAT == 1 && thread == 0) scales[row] = __fmul_rn(__fdiv_rn(top, 127.0f), rms_inverse);
      for (int chunk = thread; chunk < chunks; chunk += threads) {
        // This thread's own: no barrier is needed.
        char* at_chunk = raw + row * raw_stride + 16 * chunk;
        float value[8], weight[8];
        widen(*reinterpret_cast<const uint4*>(at_chunk), value);
        if (norm != nullptr) widen(gain[chunk], weight);
        if (FORMAT == 1) {
          std::uint32_t codes[2] = {0, 0};
#pragma unroll
          for (int i = 0; i < 8; i++) {
            const float wide = norm == nullptr ? value[i] : __fmul_rn(value[i], weight[i]);
            const int code = max(-128, min(127, __float2int_rn(__fmul_rn(wide, factor))));
            codes[i / 4] |= static_cast<std::uint32_t>(code & 0xff) << (8 * (i % 4));
          }
          *reinterpret_cast<uint2*>(smem + row * row_bytes(k) + 8 * chunk) = make_uint2(codes[0], codes[1]);
        } else {
          std::uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 normed = rounded_pair(value[2 * i] * rms_inverse, value[2 * i + 1] * rms_inverse);
            words[i] = pack(normed.x * weight[2 * i], normed.y * weight[2 * i + 1]);
          }
          *reinterpret_cast<uint4*>(at_chunk) = make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }
  sync_block();
}

// The norm's weight is no other kernel's work: it is fetched before the wait, each thread what it will read.
DEVICE void fetch_gain(char* smem, const Layout& at, const void* norm, int k) {
  if (norm == nullptr) return;
  for (int chunk = threadIdx.x; chunk < k / 8; chunk += blockDim.x)
    *reinterpret_cast<uint4*>(smem + at.gain + 16 * chunk) = load_once(static_cast<const char*>(norm) + 16 * chunk);
}

// What follows a product: scales, bias, SiLU, residual, one rounding. Loads when it is made, so that this can be early.
template <bool GATED>
struct Ending {
  int row, column;
  float scale = 1.0f, up_scale = 1.0f, bias = 0.0f, up_bias = 0.0f, residual = 0.0f;

  // index: of the results of a block, which has those from column `first` on, `width` of each row.
  DEVICE Ending(const FewRowsArguments& a, int first, int width, int index)
      : row(index / width), column(first + index % width) {
    const int n = static_cast<int>(a.n);
    if (row >= a.m || column >= n) {
      column = -1;
      return;
    }
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

  DEVICE void write(const FewRowsArguments& a, float x_scale, Sum sum, Sum up_sum) const {
    if (column < 0) return;
    const auto widened = [&](Sum product, float weight_scale) {
      const float wide = static_cast<float>(product);
      return FORMAT == 1 ? __fmul_rn(__fmul_rn(wide, x_scale), weight_scale) : wide;
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
