// The int8 product for Hopper: bulk tensor copies feed wgmma, one persistent block a multiprocessor.
//
// One tile shape a compilation. Macros: PYMLLM_TILE_M, _N, _K; PYMLLM_CLUSTER_M, _N; PYMLLM_PINGPONG (two
// groups of warps work on a tile each, otherwise both on one); PYMLLM_OUT (see int8_gemm.h).
// Collectives and schedules: CUTLASS, media/docs/cpp/gemm_api_3x.md.

#include "int8_gemm.h"

#include "cute/tensor.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

using TileShape = Shape<Int<PYMLLM_TILE_M>, Int<PYMLLM_TILE_N>, Int<PYMLLM_TILE_K>>;
using ClusterShape = Shape<Int<PYMLLM_CLUSTER_M>, Int<PYMLLM_CLUSTER_N>, _1>;
#if PYMLLM_PINGPONG
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
#else
using MainloopSchedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
#endif

constexpr int kInAlignment = 16;
constexpr int kOutAlignment = 16 / sizeof(OutElement);

struct Present {
  bool present = false;
};

// The residual, fetched only where there is one.
struct Residual : PlainVisitor<fusion::Sm90SrcFetch<OutElement>, Present> {
  using PlainVisitor::PlainVisitor;

  CUTLASS_DEVICE bool is_producer_load_needed() const { return params.present; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return params.present; }
};

// The root of the epilogue's tree: `dequantize` over the fragments of its children.
struct Dequantize : PlainVisitor<fusion::Sm90VisitorImpl<>, Terms> {
  using PlainVisitor::PlainVisitor;

  struct ConsumerStoreCallbacks : fusion::EmptyConsumerStoreCallbacks {
    CUTLASS_DEVICE explicit ConsumerStoreCallbacks(Params const& params) : params(params) {}

    Params const& params;

    template <class Accumulator, class... Inputs>
    CUTLASS_DEVICE auto visit(Accumulator const&, int, int, int, Inputs const&... inputs) {
      return dequantize(params, inputs...);
    }
  };

  template <bool ReferenceSrc, class... Args>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(fusion::ConsumerStoreArgs<Args...> const&) {
    return ConsumerStoreCallbacks(params);
  }
};

template <class Element>
using PerRow = fusion::Sm90ColBroadcast<0, TileShape, Element, Element, Stride<bool, _0, int>>;
template <class Element>
using PerColumn = fusion::Sm90RowBroadcast<0, TileShape, Element, Element, Stride<_0, _1, int>>;

using Epilogue = fusion::Sm90EVT<
    Dequantize, fusion::Sm90AccFetch, PerRow<float>, PerRow<std::int32_t>, PerColumn<float>, PerColumn<std::int32_t>,
    PerColumn<float>, Residual>;

using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileShape, ClusterShape,
    cutlass::epilogue::collective::EpilogueTileAuto, std::int32_t, float, OutElement, cutlass::layout::RowMajor,
    kOutAlignment, OutElement, cutlass::layout::RowMajor, kOutAlignment, EpilogueSchedule, Epilogue>::CollectiveOp;

using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, std::int8_t, cutlass::layout::RowMajor, kInAlignment,
    std::int8_t, cutlass::layout::ColumnMajor, kInAlignment, std::int32_t, TileShape, ClusterShape,
    cutlass::gemm::collective::StageCountAutoCarveout<
        static_cast<int>(sizeof(typename CollectiveEpilogue::SharedStorage))>,
    MainloopSchedule>::CollectiveOp;

using Kernel = cutlass::gemm::kernel::GemmUniversal<
    Shape<int, int, int, int>, CollectiveMainloop, CollectiveEpilogue, cutlass::gemm::PersistentScheduler>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

typename Gemm::Arguments translate(Int8GemmArguments const& in) {
  int const m = static_cast<int>(in.m), n = static_cast<int>(in.n), k = static_cast<int>(in.k);
  bool const per_row = in.per_row != 0;
  auto const* residual = static_cast<OutElement const*>(in.residual);
  auto* d = static_cast<OutElement*>(in.d);
  auto stride_c = cutlass::make_cute_packed_stride(typename Kernel::StrideC{}, make_shape(m, n, 1));
  get<0>(stride_c) = residual != nullptr ? in.residual_stride : in.n;

  typename Epilogue::Arguments fused{
      {},
      {in.a_scale, 0.0f, {per_row, _0{}, 0}},
      {in.zero_point, 0, {per_row, _0{}, 0}},
      {in.b_scale, 0.0f, {_0{}, _1{}, 0}},
      {in.b_sum, 0, {_0{}, _1{}, 0}},
      {in.bias, 0.0f, {_0{}, _1{}, 0}},
      {residual != nullptr},
      {in.zero_point != nullptr, residual != nullptr},
  };
  typename Gemm::Arguments out{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {m, n, k, 1},
      {in.a, cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, make_shape(m, k, 1)), in.b,
       cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, make_shape(n, k, 1))},
      {fused, residual != nullptr ? residual : d, stride_c, d,
       cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, make_shape(m, n, 1))},
  };
  using Raster = cutlass::gemm::kernel::detail::RasterOrderOptions;
  out.scheduler.max_swizzle_size = in.swizzle > 0 ? in.swizzle : 1;
  out.scheduler.raster_order = in.raster == 1 ? Raster::AlongM : in.raster == 2 ? Raster::AlongN : Raster::Heuristic;
  cudaGetDevice(&out.hw_info.device_id);
  out.hw_info.sm_count =
      cutlass::KernelHardwareInfo::query_device_multiprocessor_count(out.hw_info.device_id);
  return out;
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
