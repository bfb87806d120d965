// What kernels ask of the hardware, each in one function: tests replace this file by an emulation on the CPU
// (tests/kernels/emulated_cuda.h) and run the very same kernels.
//
// PYMLLM_HALF: the type of 16-bit numbers, 0 for bfloat16, 1 for float16. Fragments of mma, ldmatrix and movmatrix:
// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix", "movmatrix".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PYMLLM_SM90 1
#else
#define PYMLLM_SM90 0
#endif

DEVICE uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- 16-bit numbers, two in a register ----

DEVICE float2 unpack(uint32_t pair) {
#if PYMLLM_HALF
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
#else
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#endif
}

DEVICE uint32_t pack(float low, float high) {
#if PYMLLM_HALF
    const __half2 pair = __floats2half2_rn(low, high);
#else
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
#endif
    return *reinterpret_cast<const uint32_t*>(&pair);
}

// Both products, each rounded once.
DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
#if PYMLLM_HALF
    using Pair = __half2;
#else
    using Pair = __nv_bfloat162;
#endif
    const Pair pair = __hmul2(*reinterpret_cast<const Pair*>(&a), *reinterpret_cast<const Pair*>(&b));
    return *reinterpret_cast<const uint32_t*>(&pair);
}

DEVICE float exp_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float inverse_root(float x) { return rsqrtf(x); }

DEVICE float inverse(float x) { return __fdividef(1.0f, x); }

// ---- a warp ----

template <class T>
DEVICE T from_lane(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}

DEVICE float across(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

DEVICE void sync_warp() { __syncwarp(); }

// d += a b: a is 16 x 16, b 16 x 8.
DEVICE void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if PYMLLM_HALF
#define PYMLLM_MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
#else
#define PYMLLM_MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
#endif
    asm volatile(PYMLLM_MMA " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lane i names row i % 8 of matrix i / 8, and gets two numbers of row i / 4 of each.
DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Four 8 x 8 matrices, transposed; lane i names row i % 8 of matrix i / 8.
DEVICE void load_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// An 8 x 8 matrix of 16-bit numbers, two of a row a lane.
DEVICE uint32_t transpose(uint32_t pair) {
    uint32_t result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// ---- memory ----

// 16 bytes on their way to shared memory, or zeros where not valid.
DEVICE void copy_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kLeft of this thread's groups are on their way.
template <int kLeft>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// From L2: the first-level cache is not coherent with what other multiprocessors wrote.
DEVICE float2 load_l2(const float* pointer) { return __ldcg(reinterpret_cast<const float2*>(pointer)); }

DEVICE int add_ordered(int32_t* counter, int value) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
    return before;
}

// ---- a block ----

DEVICE void sync_block() { __syncthreads(); }

// ---- the chain of kernels (CUDA programming guide, "Programmatic Dependent Launch") ----

DEVICE void launch_dependents() {
#if PYMLLM_SM90
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void wait_for_previous() {
#if PYMLLM_SM90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- a cluster ----

// All blocks of the cluster have begun, and see what was initialised before. Some time may pass between the two.
DEVICE void arrive_begun() {
#if PYMLLM_SM90
    asm volatile("fence.mbarrier_init.release.cluster;\n barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

DEVICE void wait_begun() {
#if PYMLLM_SM90
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A barrier in shared memory that waits once, for `bytes` that other blocks push.
DEVICE void expect_pushes(uint64_t* barrier, int bytes) {
#if PYMLLM_SM90
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

DEVICE void wait_pushes(uint64_t* barrier) {
#if PYMLLM_SM90
    uint32_t done;
    do {
        asm volatile(
            "{\n .reg .pred p;\n"
            " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
            " selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier))
            : "memory");
    } while (!done);
#endif
}

// Two floats to the same place in the shared memory of the cluster's first block, whose barrier counts the bytes.
DEVICE void push(float* to, float2 value, uint64_t* barrier) {
#if PYMLLM_SM90
    uint32_t address, counter;
    asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(address) : "r"(shared_address(to)));
    asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(counter) : "r"(shared_address(barrier)));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
                 "f"(value.x), "f"(value.y), "r"(counter)
                 : "memory");
#endif
}
