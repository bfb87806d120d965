// What the int8 products share: the arguments of one call, element types, error codes, dequantisation and launch.
//
// D[M, N] = (A[M, K] · B[N, K]^T - zero_point[m] · b_sum[n]) · a_scale[m] · b_scale[n] + bias[n] + residual[m, n]
//
// A and B are int8, rows contiguous. The product is exact in int32, its correction in int64; the rest is
// float32, in this order, each operation rounded to nearest; D is rounded once, at the end.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cutlass/array.h"
#include "cutlass/cuda_host_adapter.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/numeric_conversion.h"
#include "cutlass/numeric_types.h"

// All else is hidden: the libraries of several tiles are loaded side by side.
#define PYMLLM_EXPORT extern "C" __attribute__((visibility("default")))

// Mirrored by `_Arguments` in cutlass/gemm.py.
struct Int8GemmArguments {
  std::int64_t m, n, k;
  const std::int8_t* a;
  const std::int8_t* b;
  const float* a_scale;            // [M], or one number where per_row is 0
  const std::int32_t* zero_point;  // as a_scale, or null
  const float* b_scale;            // [N]
  const std::int32_t* b_sum;       // [N], or null: sums of B's rows
  const float* bias;               // [N], or null
  const void* residual;            // [M, N] in D's type, or null
  std::int64_t residual_stride;    // elements from row to row
  void* d;                         // [M, N], contiguous
  std::int32_t per_row;
  std::int32_t raster;   // 0: chosen by CUTLASS, 1: along M, 2: along N
  std::int32_t swizzle;  // how many tiles wide the bands are in which tiles are walked
};

// Mirrored by `_ERRORS` in cutlass/gemm.py. A CUDA error e is returned as 1000 + e.
enum Int8GemmError : int {
  kOk = 0,
  kShape = 1,
  kWorkspace = 2,
  kInternal = 3,
  kCuda = 1000,
};

#if PYMLLM_OUT == 0
using OutElement = cutlass::bfloat16_t;
#elif PYMLLM_OUT == 1
using OutElement = cutlass::half_t;
#elif PYMLLM_OUT == 2
using OutElement = float;
#else
#error "PYMLLM_OUT: 0 bfloat16, 1 float16, 2 float32"
#endif

// One element of D before its rounding. `corrected` and `added` are uniform over the whole launch.
__device__ __forceinline__ float dequantize(
    std::int32_t product, std::int32_t zero_point, std::int32_t b_sum, float a_scale, float b_scale, float bias,
    float residual, bool corrected) {
  // The correction of a row far from zero does not fit int32.
  float wide = corrected ? __ll2float_rn(static_cast<std::int64_t>(product) -
                                         static_cast<std::int64_t>(zero_point) * b_sum)
                         : __int2float_rn(product);
  float scaled = __fmul_rn(__fmul_rn(wide, a_scale), b_scale);
  return __fadd_rn(__fadd_rn(scaled, bias), residual);
}

// What a launch has beyond the scales.
struct Terms {
  bool corrected = false;  // zero points
  bool added = false;      // a residual
};

// Elements of D, rounded.
template <int Size>
CUTLASS_DEVICE cutlass::Array<OutElement, Size> dequantize(
    Terms const& terms, cutlass::Array<std::int32_t, Size> const& product,
    cutlass::Array<float, Size> const& a_scale, cutlass::Array<std::int32_t, Size> const& zero_point,
    cutlass::Array<float, Size> const& b_scale, cutlass::Array<std::int32_t, Size> const& b_sum,
    cutlass::Array<float, Size> const& bias, cutlass::Array<OutElement, Size> const& residual) {
  cutlass::Array<float, Size> wide;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < Size; ++i) {
    // Without a residual its registers hold nothing that may be read.
    float const add = terms.added ? static_cast<float>(residual[i]) : 0.0f;
    wide[i] = dequantize(product[i], zero_point[i], b_sum[i], a_scale[i], b_scale[i], bias[i], add, terms.corrected);
  }
  return cutlass::NumericArrayConverter<OutElement, float, Size>{}(wide);
}

// A visitor of the epilogue whose arguments reach the device as they are, and which needs no memory of its own.
template <class Base, class Plain>
struct PlainVisitor : Base {
  using Arguments = Plain;
  using Params = Plain;
  struct SharedStorage {};

  template <class ProblemShape>
  static constexpr Params to_underlying_arguments(ProblemShape const&, Arguments const& args, void*) {
    return args;
  }
  template <class ProblemShape>
  static bool can_implement(ProblemShape const&, Arguments const&) {
    return true;
  }
  template <class ProblemShape>
  static std::size_t get_workspace_size(ProblemShape const&, Arguments const&) {
    return 0;
  }
  template <class ProblemShape>
  static cutlass::Status initialize_workspace(
      ProblemShape const&, Arguments const&, void*, cudaStream_t, cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE PlainVisitor() {}
  CUTLASS_HOST_DEVICE PlainVisitor(Params const& params, SharedStorage const&) : params(params) {}

  Params params;
};

inline int error_of(cutlass::Status status) {
  if (status == cutlass::Status::kSuccess) return kOk;
  cudaError_t const error = cudaGetLastError();
  return error == cudaSuccess ? kInternal : kCuda + static_cast<int>(error);
}

// Launch one product on `stream`. Returns an Int8GemmError.
template <class Gemm>
int launch(
    typename Gemm::Arguments const& args, void* workspace, std::size_t workspace_size, cudaStream_t stream) {
  if (Gemm::can_implement(args) != cutlass::Status::kSuccess) return kShape;
  if (workspace_size < Gemm::get_workspace_size(args)) return kWorkspace;
  Gemm gemm;
  cutlass::Status const status = gemm.initialize(args, workspace, stream);
  return error_of(status == cutlass::Status::kSuccess ? gemm.run(stream) : status);
}
