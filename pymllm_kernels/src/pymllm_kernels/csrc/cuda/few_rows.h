// What the linear nodes of few and of some rows share: arguments, instructions, what follows a product.

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
  const void* x;            // [M, K] bfloat16; where weights are int8 and x_scale is given, codes
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
  std::int32_t ahead;       // of one row of x, unless int4: loads on their way for each result; 0: on the tensor cores
  std::int32_t warps;       // of a block
  std::int32_t blocks;      // at most, each of which takes tiles in turn
  std::int32_t closer;      // bytes of each of its tiles or results that a warp brings closer while x is on its way
  std::int32_t pdl;
};

constexpr int kShape = 1;  // returned where no kernel takes the arguments; `launch` says the rest

namespace {

constexpr int FORMAT = PYMLLM_FORMAT;
constexpr int PARTS = PYMLLM_PARTS;
// Columns, of which K has a multiple: of bfloat16 those of 16 bytes, else those of a unit (tiles.h).
constexpr int UNIT = FORMAT == 0 ? 8 : FORMAT == 1 ? 64 : 128;
constexpr int X_LOADS = FORMAT == 2 ? 4 : 1;  // of 16 bytes, for a unit and a row of x
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

// What follows a product: scales, bias, SiLU, residual, one rounding. Loads when it is made, so that this can be early.
template <bool GATED>
struct Ending {
  int row, column;
  float x_scale = 1.0f, scale = 1.0f, up_scale = 1.0f, bias = 0.0f, up_bias = 0.0f, residual = 0.0f;

  DEVICE Ending() : row(0), column(-1) {}  // of no result

  // index: of the results of a block, which has those from column `first` on, `width` of each row.
  DEVICE Ending(const FewRowsArguments& a, int first, int width, int index)
      : Ending(a, index / width, first + index % width) {}

  DEVICE Ending(const FewRowsArguments& a, int of_row, int of_column) : row(of_row), column(of_column) {
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
  DEVICE float result(float factor, Sum sum, Sum up_sum) const {
    const auto widened = [&](Sum product, float weight_scale) {
      const float wide = __fmul_rn(static_cast<float>(product), x_scale * factor);
      return FORMAT == 1 ? __fmul_rn(wide, weight_scale) : wide;
    };
    float y = widened(sum, scale) + bias;
    if (GATED) y = y / (1.0f + __expf(-y)) * (widened(up_sum, up_scale) + up_bias);
    return y + residual;
  }

  DEVICE void write(const FewRowsArguments& a, float factor, Sum sum, Sum up_sum) const {
    if (column < 0) return;
    const float y = result(factor, sum, up_sum);
    const std::int64_t to = row * a.n + column;
    if (a.out_float)
      static_cast<float*>(a.out)[to] = y;
    else
      static_cast<std::uint16_t*>(a.out)[to] = to_bfloat16(y);
  }
};

}  // namespace
