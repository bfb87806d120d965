// Linear nodes of many rows: y = act(x · W^T + bias) + residual for up to some hundred rows of x in bfloat16, one launch.
// Compute capability 9.0.
//
// Between one row, where W is all that is read, and prompts, where products are all that is computed: a launch takes as long
// to begin and to end as to work. So
// - the device copies tiles of W and x into a ring in shared memory by itself (TMA), which costs one thread a few
//   instructions, and the tensor cores multiply from there (wgmma);
// - the weights of the first chunks are asked for before the kernel that makes x has finished (programmatic dependent
//   launch), which cuBLAS's kernels do not do;
// - where there are too few rows of W for all multiprocessors, blocks of a cluster share the columns: the others push
//   their sums into the shared memory of the first one, which adds them in the order of the blocks, so that the bits are
//   the same every time;
// - what is not in the loop is short: it took longer than the loop at first.
//
// The rows of W are the rows of the product, 64 for each group of four warps, those of x its columns. Where gated, the first half
// of a block's rows are of gate, the others of up. The norm is a launch of its own: done where x lies in shared memory, by
// every block, it took as long (benchmarks/notes.md).

#include "many_rows.h"

namespace {

struct Task {
  ManyRowsArguments asked;
  TileMap weight, x;
};

template <int X_ROWS, int GROUPS, bool GATED>
__global__ void __launch_bounds__(GROUPS* GROUP_THREADS + 32, 1) many_rows_kernel(const __grid_constant__ Task task) {
  const FewRowsArguments& a = task.asked.product;
  constexpr int WIDTH = GROUP_ROWS * GROUPS, RESULTS = GATED ? WIDTH / 2 : WIDTH, THREADS = GROUP_THREADS * GROUPS;
  PYMLLM_SHARED_TILES(smem);
  launch_dependents();
  const int stages = task.asked.stages, splits = task.asked.splits, split = blockIdx.x % splits;
  const int m = static_cast<int>(a.m), n = static_cast<int>(a.n);
  const int x_tiles = (m + X_ROWS - 1) / X_ROWS, place = blockIdx.x / splits;
  const int x_row = place % x_tiles * X_ROWS, first = place / x_tiles * RESULTS;
  const int chunks = (static_cast<int>(a.k) + CHUNK - 1) / CHUNK, begin = split * chunks / splits;
  const int count = (split + 1) * chunks / splits - begin;
  const Room at(X_ROWS, GROUPS, stages, splits);
  std::uint64_t* const full = reinterpret_cast<std::uint64_t*>(smem + at.barriers);
  std::uint64_t *const free = full + stages, *const pushed = free + stages;

  // Of a chunk, to its stage.
  const auto fetch_weights = [&](int chunk, int slot) {
    arrive_expecting(full + slot, at.stage);
#pragma unroll 1
    for (int tile = 0; tile < TILES; tile++) {
      char* const to = smem + slot * at.stage + tile * WIDTH * ROW_BYTES;
      const int column = (begin + chunk) * CHUNK + tile * TILE_COLUMNS;
      fetch_tile(to, task.weight, column, first, full + slot);
      if (GATED) fetch_tile(to + RESULTS * ROW_BYTES, task.weight, column, n + first, full + slot);
    }
  };
  const auto fetch_x = [&](int chunk, int slot) {
#pragma unroll 1
    for (int tile = 0; tile < TILES; tile++)
      fetch_tile(smem + slot * at.stage + at.weights + tile * X_ROWS * ROW_BYTES, task.x,
                 (begin + chunk) * CHUNK + tile * TILE_COLUMNS, x_row, full + slot);
  };
  const bool fetches = threadIdx.x == THREADS;
  const int early = stages < count ? stages : count;
  if (fetches) {
#pragma unroll 1
    for (int i = 0; i < stages; i++) {
      init_barrier(full + i, 1);
      init_barrier(free + i, GROUPS);
    }
    init_barrier(pushed, 1);
    publish_barriers();
#pragma unroll 1
    for (int i = 0; i < early; i++) fetch_weights(i, i);
    prefetch_map(task.x);
    if (split == 0 && splits > 1) arrive_expecting(pushed, (splits - 1) * at.share);
  }
  sync_block();
  if (splits > 1) {
    arrive_begun();
    wait_begun();
  }
  if (threadIdx.x >= THREADS) {
    if (!fetches) return;
    wait_for_previous();
#pragma unroll 1
    for (int i = 0; i < early; i++) fetch_x(i, i);
#pragma unroll 1
    for (int i = stages, slot = 0, parity = 0; i < count; i++) {
      wait_phase(free + slot, parity);
      fetch_weights(i, slot);
      fetch_x(i, slot);
      if (++slot == stages) slot = 0, parity ^= 1;
    }
    return;
  }

  // A thread ends with pairs of neighbouring results of every STEP-th row of x, of which the residual is asked for now.
  const int thread = threadIdx.x, group = thread / GROUP_THREADS, inside = thread % GROUP_THREADS;
  constexpr int STEP = THREADS / (RESULTS / 2), PLACES = X_ROWS < STEP ? 1 : X_ROWS / STEP;
  const int top = thread / (RESULTS / 2), pair = 2 * (thread % (RESULTS / 2));
  const int column = first + pair, left = column < n ? min(m - x_row, X_ROWS) : 0;
  std::uint32_t residual[PLACES];
  if (a.residual != nullptr && split == 0) {
    wait_for_previous();
    const auto* from = static_cast<const std::uint16_t*>(a.residual) + (x_row + top) * a.residual_stride + column;
#pragma unroll
    for (int i = 0; i < PLACES; i++) {
      if (top + i * STEP < left) residual[i] = *reinterpret_cast<const std::uint32_t*>(from);
      from += STEP * a.residual_stride;
    }
  }

  Sums<X_ROWS> sums = {};
  hold(sums);
#pragma unroll 1
  for (int i = 0, slot = 0, before = 0, parity = 0; i < count; i++) {
    wait_phase(full + slot, parity);
    const char* const stage = smem + slot * at.stage;
    begin_products();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      const std::uint64_t x = described(stage + at.weights + tile * X_ROWS * ROW_BYTES);
      const std::uint64_t weight = described(stage + (tile * GROUPS + group) * GROUP_ROWS * ROW_BYTES);
#pragma unroll
      for (int j = 0; j < TILE_COLUMNS / 16; j++) multiply_tiles(sums, weight + 2 * j, x + 2 * j);  // 32 bytes further
    }
    commit_products();
    if (i > 0) {
      wait_products<1>();
      // Nobody waits for the last ones.
      if (inside == 0 && i - 1 + stages < count) arrive(free + before);
    }
    before = slot;
    if (++slot == stages) slot = 0, parity ^= 1;
  }
  wait_products<0>();
  hold(sums);

  // The pair of sums `i` of this thread in the inbox.
  constexpr int PAIRS = X_ROWS / 4;
  const auto inbox = [&](int of, int i) {
    return reinterpret_cast<float*>(smem + at.inbox) + 2 * (((of - 1) * PAIRS + i) * THREADS + thread);
  };
  if (split != 0) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) push_to(0, inbox(split, i), make_float2(sums.of[2 * i], sums.of[2 * i + 1]), pushed);
    return;
  }
  if (splits > 1) {
    wait_phase(pushed, 0);
#pragma unroll 1
    for (int of = 1; of < splits; of++)
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        const float2 other = *reinterpret_cast<const float2*>(inbox(of, i));
        sums.of[2 * i] += other.x;
        sums.of[2 * i + 1] += other.y;
      }
  }

  sync_threads(THREADS);  // all are done with the stages
  float* const all = reinterpret_cast<float*>(smem);
  float* const own = all + inside % 4 * 2 * at.stride + group * GROUP_ROWS + inside / 32 * 16 + inside / 4 % 8;
#pragma unroll
  for (int i = 0; i < X_ROWS / 2; i++) own[(i / 4 * 8 + i % 2) * at.stride + i / 2 % 2 * 8] = sums.of[i];
  float2 bias = make_float2(0.0f, 0.0f), up_bias = bias;
  if (a.bias != nullptr && column < n) {
    bias = *reinterpret_cast<const float2*>(a.bias + column);
    if (GATED) up_bias = *reinterpret_cast<const float2*>(a.bias + n + column);
  }
  sync_threads(THREADS);

  std::int64_t to = static_cast<std::int64_t>(x_row + top) * n + column;
#pragma unroll
  for (int i = 0; i < PLACES; i++) {
    const int row = top + i * STEP;
    if (row >= left) break;
    const float* const of = all + row * at.stride + pair;
    float2 y = *reinterpret_cast<const float2*>(of);
    y.x += bias.x;
    y.y += bias.y;
    if constexpr (GATED) {
      const float2 up = *reinterpret_cast<const float2*>(of + RESULTS);
      y.x = inverse(1.0f + __expf(-y.x)) * y.x * (up.x + up_bias.x);
      y.y = inverse(1.0f + __expf(-y.y)) * y.y * (up.y + up_bias.y);
    }
    if (a.residual != nullptr) {
      const float2 add = unpack(residual[i]);
      y.x += add.x;
      y.y += add.y;
    }
    if (a.out_float)
      *reinterpret_cast<float2*>(static_cast<float*>(a.out) + to) = y;
    else
      *reinterpret_cast<std::uint32_t*>(static_cast<std::uint16_t*>(a.out) + to) = pack(y.x, y.y);
    to += static_cast<std::int64_t>(STEP) * n;
  }
}

template <int X_ROWS, int GROUPS, bool GATED>
int run(const ManyRowsArguments& asked, cudaStream_t stream) {
  const FewRowsArguments& a = asked.product;
  const Room at(X_ROWS, GROUPS, asked.stages, asked.splits);
  Task task{asked, {}, {}};
  const int results = GROUP_ROWS * GROUPS / (GATED ? 2 : 1);
  if (const int refused = map_tiles(task.weight, a.weight, GATED ? 2 * a.n : a.n, a.k, a.weight_stride, results))
    return refused;
  // The stride of a single row may be anything.
  if (const int refused = map_tiles(task.x, a.x, a.m, a.k, a.m == 1 ? 2 * a.k : a.x_stride, X_ROWS)) return refused;
  const std::int64_t blocks = (a.n + results - 1) / results * ((a.m + X_ROWS - 1) / X_ROWS) * asked.splits;
  return launch_clusters(many_rows_kernel<X_ROWS, GROUPS, GATED>, dim3(static_cast<unsigned>(blocks)), asked.splits,
                         GROUPS * GROUP_THREADS + 32, at.total, a.pdl != 0, stream, task);
}

template <int X_ROWS>
int choose(const ManyRowsArguments& a, cudaStream_t stream) {
  if (a.product.gated) return a.groups == 1 ? run<X_ROWS, 1, true>(a, stream) : run<X_ROWS, 2, true>(a, stream);
  return a.groups == 1 ? run<X_ROWS, 1, false>(a, stream) : run<X_ROWS, 2, false>(a, stream);
}

}  // namespace

PYMLLM_EXPORT int pymllm_many_rows(const ManyRowsArguments* a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const FewRowsArguments& of = a->product;
  const int splits = a->splits;
  if (of.m < 1 || of.n < 1 || of.k < 1 || of.k % 8 || of.weight_stride % 16 || of.x_stride % 16) return kShape;
  // Results and residuals are read and written in pairs.
  if (of.n % 2 || of.residual_stride % 2 || reinterpret_cast<std::uintptr_t>(of.residual) % 4) return kShape;
  if (of.norm != nullptr || a->groups < 1 || a->groups > 2 || a->stages < 2 || a->stages > MAX_STAGES) return kShape;
  if (splits < 1 || splits > 8 || splits & (splits - 1)) return kShape;
  switch (a->x_rows) {
    case 8: return choose<8>(*a, on);
    case 16: return choose<16>(*a, on);
    case 32: return choose<32>(*a, on);
    case 64: return choose<64>(*a, on);
    case 128: return choose<128>(*a, on);
    default: return kShape;
  }
}

// Bytes of shared memory of a block, by x_rows, groups, stages and splits.
PYMLLM_EXPORT int pymllm_many_rows_shared_memory(const ManyRowsArguments* a) {
  return Room(a->x_rows, a->groups, a->stages, a->splits).total;
}
