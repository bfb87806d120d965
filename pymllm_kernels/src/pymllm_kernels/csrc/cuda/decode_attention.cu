// The library of decode_kernel.h: its instances, and how they are launched.
#include "warp.h"

#include "decode_kernel.h"

namespace {

// Three blocks of four warps find room on a Hopper multiprocessor if a thread has 168 registers at most.
template <int kWarps, int kColumns, bool kSpare>
__global__ void __launch_bounds__(kWarps * 32, PYMLLM_SM90 && kSpare && kWarps == 4 ? 3 : 1)
    decode_kernel(const __grid_constant__ DecodeArguments a) {
    extern __shared__ __align__(128) uint16_t shared[];
    decode<kWarps, kColumns, kSpare>(a, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, shared);
}

template <int kWarps>
struct SetUp {
    template <int kColumns, bool kSpare>
    cudaError_t operator()() const {
        const auto kernel = decode_kernel<kWarps, kColumns, kSpare>;
        int device, major, bytes;
        cudaError_t status = cudaGetDevice(&device);
        if (status != cudaSuccess) return status;
        status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (status != cudaSuccess) return status;
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (status != cudaSuccess) return status;
        status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        if (status != cudaSuccess || major < 9) return status;
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
};

template <int kWarps>
struct Launch {
    const DecodeArguments& a;
    cudaStream_t stream;

    template <int kColumns, bool kSpare>
    cudaError_t operator()() const {
        cudaLaunchAttribute attributes[2];
        cudaLaunchConfig_t config = {};
        config.gridDim = dim3(1 << a.splits_shift, a.kv_heads, a.batch);
        config.blockDim = dim3(kWarps * 32);
        config.dynamicSmemBytes = shared_bytes<kWarps>();
        config.dynamicSmemBytes += inbox_floats(1 << a.cluster_shift, a.group) * 4;
        config.stream = stream;
        config.attrs = attributes;
        if (a.pdl) {
            attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
        }
        if (a.cluster_shift > 0) {
            attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
            attributes[config.numAttrs].val.clusterDim.x = 1 << a.cluster_shift;
            attributes[config.numAttrs].val.clusterDim.y = 1;
            attributes[config.numAttrs++].val.clusterDim.z = 1;
        }
        return cudaLaunchKernelEx(&config, decode_kernel<kWarps, kColumns, kSpare>, a);
    }
};

}  // namespace

// Both return a cudaError_t. The first one is called once for each device, outside of any capture.
extern "C" __attribute__((visibility("default"))) int pymllm_decode_attention_set_up() {
    for (const int group : {1, 8, 16})
        for (const cudaError_t status : {for_group(group, SetUp<4>{}), for_group(group, SetUp<8>{})})
            if (status != cudaSuccess) return status;
    return cudaSuccess;
}

extern "C" __attribute__((visibility("default"))) int pymllm_decode_attention(const DecodeArguments* a, void* stream) {
    if (a->group < 1 || a->group > kMaxGroup || a->batch < 1 || a->cluster_shift > a->splits_shift)
        return cudaErrorInvalidValue;
    const auto to = static_cast<cudaStream_t>(stream);
    if (a->warps == 4) return for_group(a->group, Launch<4>{*a, to});
    if (a->warps == 8) return for_group(a->group, Launch<8>{*a, to});
    return cudaErrorInvalidValue;
}

// Bytes of a block without the inbox of a cluster, for benchmarks/cuda_resources.py.
extern "C" __attribute__((visibility("default"))) int pymllm_decode_attention_shared_memory(int warps) {
    return warps * shared_bytes<1>() - (warps - 1) * 16;
}

