// What the linear node of many rows asks of compute capability 9.0 beyond stream.h: tiles that the device copies by
// itself (TMA), barriers that count their bytes, and products of four warps straight from shared memory (wgmma). Like
// stream.h replaced by an emulation on the CPU (tests/kernels/emulated_hopper.h).
//
// PTX ISA: "cp.async.bulk.tensor", "mbarrier", "wgmma.mma_async", "Matrix Descriptor"; CUDA driver API:
// "cuTensorMapEncodeTiled".

#pragma once

#include <cuda.h>

#include "stream.h"

// Declares the shared memory of a block: swizzled tiles begin at multiples of 1024 bytes.
#define PYMLLM_SHARED_TILES(name) extern __shared__ __align__(1024) char name[]

// ---- matrices in global memory, of which tiles are copied ----

using TileMap = CUtensorMap;

constexpr int TILE_COLUMNS = 64;  // of a tile: 128 bytes, as many as the swizzle takes

// Of a matrix of 16-bit numbers whose rows are `stride` bytes apart: tiles of `height` rows, up to 256, and TILE_COLUMNS
// columns. What lies beside the matrix is copied as zeros. Returns 0, or as `launch`.
inline int map_tiles(TileMap& map, const void* base, std::int64_t rows, std::int64_t columns, std::int64_t stride,
                     int height) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                              const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  // The driver's function, without linking its library, which a machine that only compiles does not have.
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (encode == nullptr) return kCuda + cudaErrorInsufficientDriver;
  const cuuint64_t shape[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {TILE_COLUMNS, static_cast<cuuint32_t>(height)}, steps[2] = {1, 1};
  const CUresult made =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base), shape, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return made == CUDA_SUCCESS ? 0 : kCuda + cudaErrorInvalidValue;
}

DEVICE void prefetch_map(const TileMap& map) {
#if PYMLLM_SM90
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// ---- barriers in shared memory ----

// A phase ends when so many have arrived and all bytes that they expect are there.
DEVICE void init_barrier(std::uint64_t* barrier, int arrivals) {
#if PYMLLM_SM90
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// For the copies of the device, too.
DEVICE void publish_barriers() {
#if PYMLLM_SM90
  asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

DEVICE void arrive_expecting(std::uint64_t* barrier, int bytes) {
#if PYMLLM_SM90
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

DEVICE void arrive(std::uint64_t* barrier) {
#if PYMLLM_SM90
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Until the phase of this parity has ended.
DEVICE void wait_phase(std::uint64_t* barrier, int parity) {
#if PYMLLM_SM90
  std::uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// The first `threads` of a block, a multiple of a warp.
DEVICE void sync_threads(int threads) { asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); }

// Two floats to the same place in the shared memory of block `rank`, whose barrier counts the bytes.
DEVICE void push_to(int rank, float* to, float2 value, std::uint64_t* barrier) {
#if PYMLLM_SM90
  std::uint32_t address, counter;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(to)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(shared_address(barrier)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "f"(value.x), "f"(value.y), "r"(counter)
               : "memory");
#endif
}

// ---- tiles in shared memory ----

// The tile that begins there, to `to`; the barrier gets its bytes. Asked for by one thread.
DEVICE void fetch_tile(void* to, const TileMap& map, int column, int row, std::uint64_t* barrier) {
#if PYMLLM_SM90
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
#endif
}

// ---- products ----

// Of tiles in shared memory as `fetch_tile` leaves them: 64 rows of one by X_ROWS rows of the other, 16 columns.
// Thread i of the four warps has rows 16 (i / 32) + i / 4 % 8 + 8 b, columns 8 c + 2 (i % 4) + a in sum[4 c + 2 b + a].
template <int X_ROWS>
struct Sums {
  float of[X_ROWS / 2];
};

// Where a tile lies: rows of 128 bytes, eight of which the swizzle mixes.
DEVICE std::uint64_t described(const void* tile) {
  return static_cast<std::uint64_t>((shared_address(tile) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define PYMLLM_SUMS8(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3]), "+f"(s[i + 4]), "+f"(s[i + 5]), "+f"(s[i + 6]), "+f"(s[i + 7])
#define PYMLLM_SUMS16(i) PYMLLM_SUMS8(i), PYMLLM_SUMS8(i + 8)

template <int X_ROWS>
DEVICE void multiply_tiles(Sums<X_ROWS>& sums, std::uint64_t weight, std::uint64_t x) {
#if PYMLLM_SM90
  float (&s)[X_ROWS / 2] = sums.of;
  if constexpr (X_ROWS == 8) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
                 : "l"(weight), "l"(x));
  } else if constexpr (X_ROWS == 16) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 0, 0;"
        : PYMLLM_SUMS8(0)
        : "l"(weight), "l"(x));
  } else if constexpr (X_ROWS == 32) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15}, %16, %17, 1, 1, 1, 0, 0;"
        : PYMLLM_SUMS16(0)
        : "l"(weight), "l"(x));
  } else if constexpr (X_ROWS == 64) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, "
        "1, 1, 0, 0;"
        : PYMLLM_SUMS16(0), PYMLLM_SUMS16(16)
        : "l"(weight), "l"(x));
  } else {
    static_assert(X_ROWS == 128);
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "
        "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "
        "%57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, 0, 0;"
        : PYMLLM_SUMS16(0), PYMLLM_SUMS16(16), PYMLLM_SUMS16(32), PYMLLM_SUMS16(48)
        : "l"(weight), "l"(x));
  }
#endif
}

DEVICE void begin_products() {
#if PYMLLM_SM90
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// All that were asked for since the last call belong together.
DEVICE void commit_products() {
#if PYMLLM_SM90
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until at most LEFT groups of products are under way.
template <int LEFT>
DEVICE void wait_products() {
#if PYMLLM_SM90
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#endif
}

// The compiler must not read sums before, or move them to other registers.
template <int X_ROWS>
DEVICE void hold(Sums<X_ROWS>& sums) {
#pragma unroll
  for (int i = 0; i < X_ROWS / 2; i++) asm volatile("" : "+f"(sums.of[i])::"memory");
}
