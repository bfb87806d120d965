// The product of int4 codes and bfloat16 on the tensor cores (tiles.h).

#pragma once

#include "few_rows.h"

namespace {

// A unit of int4: widened, multiplied, scaled.
//
// What a code and its zero point are offset by is not subtracted from every weight, but once from a group's sums: times
// the sum of x. Of staged x it is known (staged_sums, of the rows 2 t and 2 t + 1), and the columns lie in the order of
// the fragments; else the tensor cores find it as the product with a row of ones.
template <int ROW_TILES, int X_TILES, bool STAGED>
DEVICE void multiply_codes(float (&sums)[ROW_TILES][X_TILES][4], const uint4 (&weights)[ROW_TILES][2],
                           const std::uint32_t (&constants)[ROW_TILES][2][PARTS], const uint4 (&x)[X_TILES][4],
                           const float (&staged_sums)[PARTS][2]) {
  constexpr int EACH = 4 / PARTS;  // words that share a scale
  constexpr std::uint32_t ONES = 0x3f803f80u;
  float group[ROW_TILES][X_TILES][4], x_sums[X_TILES][4];
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint4 b[X_TILES];
#pragma unroll
    for (int c = 0; c < X_TILES; c++) {
      if (STAGED) {
        b[c] = x[c][j];
#pragma unroll
        for (int i = 0; i < 4; i++) x_sums[c][i] = staged_sums[j / EACH][i % 2];
        continue;
      }
      b[c] = in_fragments(x[c][j]);
      if (j % EACH == 0) x_sums[c][0] = x_sums[c][1] = x_sums[c][2] = x_sums[c][3] = 0.0f;
      multiply(x_sums[c], ONES, ONES, ONES, ONES, b[c].x, b[c].y);
      multiply(x_sums[c], ONES, ONES, ONES, ONES, b[c].z, b[c].w);
    }
#pragma unroll
    for (int r = 0; r < ROW_TILES; r++) {
      const std::uint32_t low_words[4] = {weights[r][0].x, weights[r][0].y, weights[r][0].z, weights[r][0].w};
      const std::uint32_t high_words[4] = {weights[r][1].x, weights[r][1].y, weights[r][1].z, weights[r][1].w};
      std::uint32_t low[4], high[4];
      bias_codes(low_words[j], low);
      bias_codes(high_words[j], high);
#pragma unroll
      for (int c = 0; c < X_TILES; c++) {
        float(&sum)[4] = group[r][c];
        if (j % EACH == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
        multiply(sum, low[0], high[0], low[1], high[1], b[c].x, b[c].y);
        multiply(sum, low[2], high[2], low[3], high[3], b[c].z, b[c].w);
        if (j % EACH == EACH - 1) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const std::uint32_t both = constants[r][i / 2][j / EACH];
            const float scale = __uint_as_float(both << 16), minus_offset = __uint_as_float(both & 0xffff0000u);
            sums[r][c][i] += scale * (sum[i] + minus_offset * x_sums[c][i]);
          }
        }
      }
    }
  }
}

}  // namespace
