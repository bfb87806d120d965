// int4 weights, dequantised for a product of many rows of x.

#pragma once

#include "few_rows.h"

namespace {

// 16 bytes of codes a thread, dequantised to bfloat16 with one rounding.
__global__ void widen_kernel(const char* words, const std::uint32_t* constants, int groups, char* out, std::int64_t first,
                             std::int64_t rows, std::int64_t half, int units, int units_per_group) {
  // A warp takes a unit of eight rows: whole sectors of codes, of constants and of results.
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, block = index / 32;
  const int t = static_cast<int>(index % 4), unit = static_cast<int>(block % units);
  const std::int64_t row = block / units * 8 + index / 4 % 8;
  if (row >= rows) return;
  // The second half's tiles follow those of the first, filled up.
  const std::int64_t from = first + row, place = from < half ? from : from - half + (half + 15) / 16 * 16;
  const std::int64_t tile = place / 16;
  const uint4 loaded =
      load_once(words + (tile * units + unit) * 1024 + place / 8 % 2 * 512 + (place % 8 * 4 + t) * 16);
  const std::uint32_t word[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  char* to = out + (row * units + unit) * 256 + 16 * t;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const int group = PARTS == 1 ? unit / units_per_group : unit * PARTS + j * PARTS / 4;
    const std::uint32_t both = constants[(tile * groups + group) * 16 + place % 16];
    const std::uint32_t scale = __byte_perm(both, 0, 0x1010);
    const std::uint32_t minus_offset = __byte_perm(both, 0, 0x3232);
    std::uint32_t codes[4], value[4];
    bias_codes(word[j], codes);
    // The difference is exact.
#pragma unroll
    for (int i = 0; i < 4; i++) value[i] = multiply_pair(add_pair(codes[i], minus_offset), scale);
    // (0, 4) (1, 5) (2, 6) (3, 7) to (0, 1) (2, 3) (4, 5) (6, 7)
    *reinterpret_cast<uint4*>(to + 64 * j) =
        make_uint4(__byte_perm(value[0], value[1], 0x5410), __byte_perm(value[2], value[3], 0x5410),
                   __byte_perm(value[0], value[1], 0x7632), __byte_perm(value[2], value[3], 0x7632));
  }
}

}  // namespace

// Rows `first` to `first + rows` of a weight, dequantised to out [rows, K] bfloat16. half: rows of gate, or all.
PYMLLM_EXPORT int pymllm_widen_int4(const void* words, const void* constants, std::int64_t groups,
                                    std::int64_t units_per_group, void* out, std::int64_t first, std::int64_t rows,
                                    std::int64_t half, std::int64_t k, void* stream) {
  if (k % UNIT || rows < 1) return kShape;
  const std::int64_t threads = (rows + 7) / 8 * (k / UNIT) * 32;
  return launch(widen_kernel, dim3(static_cast<unsigned>((threads + 255) / 256)), 256, 0, false,
                static_cast<cudaStream_t>(stream), static_cast<const char*>(words),
                static_cast<const std::uint32_t*>(constants), static_cast<int>(groups), static_cast<char*>(out), first,
                rows, half, static_cast<int>(k / UNIT), static_cast<int>(units_per_group));
}
