// Linear nodes of few rows: y = act(norm(x) · W^T + bias) + residual for up to 32 rows of x, one launch.
//
// Bound by reading W, so everything serves that: every weight travels once, 16 bytes a lane, from global memory
// straight into the registers in which it is multiplied. No shared memory and no barrier is in the way while the
// weights stream, and the first of them are asked for before the kernel that makes x has finished (programmatic
// dependent launch).
//
// One row times bfloat16 or int8 by multiply-adds (one_row.h); int4, and several rows times int8, on the tensor cores
// (tiles.h). Several rows times bfloat16 are some_rows.cu's.

#if PYMLLM_FORMAT != 2
#include "one_row.h"
#else
#include "widen_int4.h"
#endif
#if PYMLLM_FORMAT != 0
#include "prepare.h"
#include "tiles.h"
#endif

PYMLLM_EXPORT int pymllm_few_rows(const FewRowsArguments* a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (a->k % UNIT || a->m < 1 || a->warps < 1 || a->blocks < 1) return kShape;
#if PYMLLM_FORMAT != 2
  if (a->ahead && a->m == 1) return run_one_row(*a, on);
#endif
#if PYMLLM_FORMAT != 0
  return run_tiles(*a, on);
#else
  return kShape;
#endif
}

// Bytes of shared memory of a block, by k and norm, and where `ahead` is 0 by m, staged, row_tiles and warps.
PYMLLM_EXPORT int pymllm_few_rows_shared_memory(const FewRowsArguments* a) {
#if PYMLLM_FORMAT != 0
  if (!a->ahead) return tiles_bytes(*a);
#endif
  return one_row_bytes(*a);
}
