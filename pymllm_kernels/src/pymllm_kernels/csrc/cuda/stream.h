// What the linear nodes of few rows ask of the hardware and of CUDA beyond warp.h: like it replaced by an emulation on
// the CPU (tests/kernels/emulated_stream.h). 16-bit numbers are bfloat16.

#pragma once

#include "warp.h"

#define PYMLLM_EXPORT extern "C" __attribute__((visibility("default")))

// Declares the shared memory of a block.
#define PYMLLM_SHARED(name) extern __shared__ __align__(16) char name[]

// ---- memory ----

// Read once, so that the first-level cache is left alone. Relaxed and not `.nc`, although nobody writes there: ptxas
// moves loads of the read-only path behind the wait, where they are of no use (tests/kernels/test_cuda_order.py).
DEVICE uint4 load_once(const void* from) {
  uint4 value;
  asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

DEVICE std::uint32_t load_word_once(const void* from) {
  std::uint32_t value;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(value) : "l"(from));
  return value;
}

DEVICE void prefetch_line(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// What another kernel wrote: not through the read-only path.
DEVICE uint4 load_shared_with_others(const void* from) {
  uint4 value;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// ---- numbers ----

// d += a b of 8-bit integers: a is 16 x 32, b 32 x 8.
DEVICE void multiply(int (&d)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3,
                     std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// word & MASK | BITS in one instruction.
template <std::uint32_t MASK, std::uint32_t BITS>
DEVICE std::uint32_t and_or(std::uint32_t word) {
  std::uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(MASK), "n"(BITS));
  return result;
}

// Both sums, each rounded once.
DEVICE std::uint32_t add_pair(std::uint32_t a, std::uint32_t b) {
  const __nv_bfloat162 pair =
      __hadd2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

// Both numbers, rounded to bfloat16.
DEVICE float2 rounded_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return make_float2(__low2float(pair), __high2float(pair));
}

DEVICE float from_bfloat16(std::uint16_t bits) { return __uint_as_float(static_cast<std::uint32_t>(bits) << 16); }

DEVICE std::uint16_t to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

DEVICE int across(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// ---- launching ----

constexpr int kCuda = 1000;  // plus a cudaError_t: what `launch` returns where CUDA refuses, else 0

// cluster: blocks of one, which divide the grid; 1 where there are none.
template <typename... Parameters>
int launch_clusters(void (*kernel)(Parameters...), dim3 grid, int cluster, int threads, int shared, bool pdl,
                    cudaStream_t stream, Parameters... arguments) {
  if (shared > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return kCuda + error;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  if (pdl) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? 0 : kCuda + error;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, bool pdl, cudaStream_t stream,
           Parameters... arguments) {
  return launch_clusters(kernel, grid, 1, threads, shared, pdl, stream, arguments...);
}
