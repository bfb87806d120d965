// The int8 product for Ampere, Orin and Ada (SM80 to 89): asynchronous copies feed mma.sync m16n8k32.
//
// One tile shape a compilation. Macros: PYMLLM_TILE_M, _N, _K; PYMLLM_WARP_M, _N; PYMLLM_STAGES;
// PYMLLM_OUT (see int8_gemm.h). Epilogue visitors of CUTLASS 2.x: Chen et al., "EVT: Accelerating Deep
// Learning Training with Epilogue Visitor Tree" (ASPLOS 2024).

#include "int8_gemm.h"

#include "cute/tensor.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/default_gemm_universal_with_visitor.h"
#include "cutlass/gemm/threadblock/threadblock_swizzle.h"
// These need what the ones above include.
#include "cutlass/epilogue/threadblock/fusion/visitors.hpp"

namespace {

using namespace cute;
namespace visitor = cutlass::epilogue::threadblock;

using TileShape = cutlass::gemm::GemmShape<PYMLLM_TILE_M, PYMLLM_TILE_N, PYMLLM_TILE_K>;
using WarpShape = cutlass::gemm::GemmShape<PYMLLM_WARP_M, PYMLLM_WARP_N, PYMLLM_TILE_K>;
using InstructionShape = cutlass::gemm::GemmShape<16, 8, 32>;

constexpr int kInAlignment = 16;
// Results leave in vectors of four: the accumulators are exchanged between threads as 16 bytes.
constexpr int kOutAlignment = 4;
using ThreadMap = visitor::OutputTileThreadLayout<TileShape, WarpShape, float, kOutAlignment, 1>;

// The residual, read only where there is one.
struct Residual : visitor::VisitorAuxLoad<ThreadMap, OutElement, Stride<std::int64_t, _1, _0>> {
  using Base = visitor::VisitorAuxLoad<ThreadMap, OutElement, Stride<std::int64_t, _1, _0>>;
  using Base::Base;

  template <class Inner>
  struct Callbacks : Inner {
    CUTLASS_DEVICE explicit Callbacks(Inner&& inner) : Inner(cute::move(inner)) {}
    CUTLASS_DEVICE void begin_step(int step) {
      if (this->params_ptr->ptr_aux != nullptr) Inner::begin_step(step);
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord tile, int thread, ProblemShape shape) {
    auto inner = Base::get_callbacks(tile, thread, shape);
    return Callbacks<decltype(inner)>(cute::move(inner));
  }
};

// `dequantize` over the fragments of its children.
struct Dequantize : PlainVisitor<visitor::VisitorImpl2x<>, Terms> {
  using PlainVisitor::PlainVisitor;

  struct Callbacks : visitor::EmptyCallbacks {
    CUTLASS_DEVICE explicit Callbacks(Params const& params) : params(params) {}

    Params params;

    template <class Accumulator, class... Inputs>
    CUTLASS_DEVICE auto visit(int, int, int, int, Accumulator const&, Inputs const&... inputs) {
      return dequantize(params, inputs...);
    }
  };

  template <class ProblemShape>
  CUTLASS_DEVICE auto get_callbacks(cutlass::gemm::GemmCoord, int, ProblemShape) {
    return Callbacks(params);
  }
};

template <class Element>
using PerRow = visitor::VisitorColBroadcast<ThreadMap, Element, Stride<int, _0, _0>>;
template <class Element>
using PerColumn = visitor::VisitorRowBroadcast<ThreadMap, Element, Stride<_0, _1, _0>>;
using Values = visitor::Sm80EVT<
    Dequantize, visitor::VisitorAccFetch, PerRow<float>, PerRow<std::int32_t>, PerColumn<float>,
    PerColumn<std::int32_t>, PerColumn<float>, Residual>;
using Store = visitor::VisitorAuxStore<
    ThreadMap, OutElement, cutlass::FloatRoundStyle::round_to_nearest, Stride<std::int64_t, _1, _0>>;
using Epilogue = visitor::Sm80EVT<Store, Values>;

using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
    std::int8_t, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, kInAlignment, std::int8_t,
    cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, kInAlignment, float, cutlass::layout::RowMajor,
    kOutAlignment, std::int32_t, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, TileShape, WarpShape,
    InstructionShape, Epilogue, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<4>, PYMLLM_STAGES,
    cutlass::arch::OpMultiplyAddSaturate, 1>::GemmKernel;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

typename Gemm::Arguments translate(Int8GemmArguments const& in) {
  int const m = static_cast<int>(in.m), n = static_cast<int>(in.n), k = static_cast<int>(in.k);
  int const row = in.per_row != 0 ? 1 : 0;
  auto* residual = static_cast<OutElement*>(const_cast<void*>(in.residual));
  typename Values::Arguments values{
      {},
      {in.a_scale, 0.0f, {row, _0{}, _0{}}},
      {in.zero_point, 0, {row, _0{}, _0{}}},
      {in.b_scale, 0.0f, {}},
      {in.b_sum, 0, {}},
      {in.bias, 0.0f, {}},
      {residual, OutElement(0), {in.residual_stride, _1{}, _0{}}},
      {in.zero_point != nullptr, residual != nullptr},
  };
  typename Epilogue::Arguments fused{values, {static_cast<OutElement*>(in.d), {in.n, _1{}, _0{}}}};
  return typename Gemm::Arguments(
      cutlass::gemm::GemmUniversalMode::kGemm, {m, n, k}, 1, fused, in.a, in.b, nullptr, nullptr, 0, 0, 0, 0, k, k, n,
      n);
}

}  // namespace

// Bytes of shared memory that one block takes.
PYMLLM_EXPORT std::size_t pymllm_int8_gemm_shared_memory() { return sizeof(typename Kernel::SharedStorage); }

// Bytes of device memory that one call needs.
PYMLLM_EXPORT std::size_t pymllm_int8_gemm_workspace_size(Int8GemmArguments const* in) {
  return Gemm::get_workspace_size(translate(*in));
}

// Launch one product on `stream`. Returns an Int8GemmError.
PYMLLM_EXPORT int pymllm_int8_gemm(
    Int8GemmArguments const* in, void* workspace, std::size_t workspace_size, cudaStream_t stream) {
  return launch<Gemm>(translate(*in), workspace, workspace_size, stream);
}
