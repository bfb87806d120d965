// Products of groups of four warps on Hopper (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate
// Instructions"); nothing elsewhere.

#pragma once

#include <cstdint>

// Set in libraries for capability 9.0: also the host must know.
#ifndef PYMLLM_WGMMA
#define PYMLLM_WGMMA 0
#endif

#if PYMLLM_WGMMA && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYMLLM_IN_GROUPS 1
#else
#define PYMLLM_IN_GROUPS 0
#endif

// What this thread's copies have put into shared memory is there for the products, too, which go another way.
DEVICE void fence_copies() {
#if PYMLLM_IN_GROUPS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

DEVICE void begin_products() {
#if PYMLLM_IN_GROUPS
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

DEVICE void commit_products() {
#if PYMLLM_IN_GROUPS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// A matrix in shared memory, rows of 128 bytes with their pieces of 16 swizzled by the row's number, eight of them in 1024
// bytes ("Matrix Descriptor Format": swizzling of 128 bytes, 1024 from eight rows to the next).
#if PYMLLM_IN_GROUPS
DEVICE std::uint64_t matrix_at(const void* shared) {
  return static_cast<std::uint64_t>((shared_address(shared) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
#endif

// sums += rows x^T, over 16 columns: 64 rows of W, and 8 rows of x for each of X_TILES. Each warp has 16 of the rows.
template <int X_TILES>
DEVICE void multiply_group(float (&sums)[X_TILES][4], const void* rows, const void* x) {
#if PYMLLM_IN_GROUPS
  static_assert(X_TILES == 4 || X_TILES == 8, "32 or 64 rows of x");
  const std::uint64_t a = matrix_at(rows), b = matrix_at(x);
#define PYMLLM_SUMS(c) "+f"(sums[c][0]), "+f"(sums[c][1]), "+f"(sums[c][2]), "+f"(sums[c][3])
  if constexpr (X_TILES == 4)
    asm volatile(
        "{\n .reg .pred add;\n setp.ne.b32 add, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, add, 1, 1, 0, 0;\n}"
        : PYMLLM_SUMS(0), PYMLLM_SUMS(1), PYMLLM_SUMS(2), PYMLLM_SUMS(3)
        : "l"(a), "l"(b));
  else
    asm volatile(
        "{\n .reg .pred add;\n setp.ne.b32 add, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, add, 1, 1, 0, 0;\n}"
        : PYMLLM_SUMS(0), PYMLLM_SUMS(1), PYMLLM_SUMS(2), PYMLLM_SUMS(3), PYMLLM_SUMS(4), PYMLLM_SUMS(5),
          PYMLLM_SUMS(6), PYMLLM_SUMS(7)
        : "l"(a), "l"(b));
#undef PYMLLM_SUMS
#endif
}

// Until the products are done. The sums are named, so that nobody reads them earlier.
template <int ROW_TILES, int X_TILES>
DEVICE void wait_for_products(float (&sums)[ROW_TILES][X_TILES][4]) {
#if PYMLLM_IN_GROUPS
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
    for (int c = 0; c < X_TILES; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) asm volatile("" : "+f"(sums[r][c][i])::"memory");
#endif
}
