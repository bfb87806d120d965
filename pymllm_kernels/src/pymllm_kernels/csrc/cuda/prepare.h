// Several rows of x made ready for tiles.h, once for all blocks of the product that follows.

#pragma once

#include "staging.h"

namespace {

// One row of x a block, times the norm's weight and quantised where weights are int8.
__global__ void prepare_kernel(const __grid_constant__ FewRowsArguments a, char* out, float* scales) {
  PYMLLM_SHARED(smem);
  launch_dependents();
  const int k = static_cast<int>(a.k), row = blockIdx.x;
  const Layout at = layout_of(k, 1, a.norm != nullptr);
  bring_closer(a.norm, k);
  wait_for_previous();
  stage<false>(smem, at, static_cast<const char*>(a.x) + row * a.x_stride, 0, 1, k, a.norm, [] {});
  for (int chunk = threadIdx.x; chunk < k * X_BYTES / 16; chunk += blockDim.x)
    reinterpret_cast<uint4*>(out + static_cast<std::int64_t>(row) * k * X_BYTES)[chunk] =
        reinterpret_cast<const uint4*>(smem)[chunk];
  if (threadIdx.x == 0) scales[row] = x_factor(smem, at, 0, k, a.norm, a.eps);
}

}  // namespace

// x times the norm's weight, quantised where weights are int8, to out [M, K]; what it lacks to scales [M].
// Of `a`: m, k, x, x_stride, norm, eps, pdl.
PYMLLM_EXPORT int pymllm_few_rows_prepare(const FewRowsArguments* a, void* out, float* scales, void* stream) {
  const int k = static_cast<int>(a->k), threads = k >= 8192 ? 512 : k >= 2048 ? 256 : 128;
  return launch(prepare_kernel, dim3(static_cast<unsigned>(a->m)), threads, one_row_bytes(*a), a->pdl != 0,
                static_cast<cudaStream_t>(stream), *a, static_cast<char*>(out), scales);
}
