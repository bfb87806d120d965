"""Registers the CPU kernels, and those of Triton, CUDA and CUTLASS for NVIDIA GPUs."""

from __future__ import annotations

from pymllm_core.hookspecs import hookimpl
from pymllm_core.specs import AttentionBackendSpec, CommandSpec, KernelSpec, Needs, ShapeRule

CONTRACT = "1.0"


def _cpu(**shape: ShapeRule) -> Needs:
    return Needs(
        devices=("cpu",),
        dtypes=("bfloat16",),
        # One library for all; every CPU that has AVX512-BF16 has VNNI.
        cpu_flags=("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"),
        programs=(("g++", "c++", "clang++"),),
        shape=shape,
    )


_ATTENTION = _cpu(head_dim=ShapeRule(multiple_of=2), same_kv_dtype=ShapeRule(one_of=(1,)))


def _triton(dtypes: tuple[str, ...] = ("bfloat16", "float16"), **shape: ShapeRule) -> Needs:
    """What every Triton kernel needs, and the shapes that this one takes."""
    return Needs(
        devices=("cuda",),
        capability_min=(8, 0),
        dtypes=dtypes,
        modules={"triton": "triton"},
        shape=shape,
    )


# A scale serves whole runs of 32 columns, of the projections up and down (of which N is twice the columns).
_INTEGER_EXPERTS = _triton(
    K=ShapeRule(multiple_of=32),
    N=ShapeRule(multiple_of=64),
    group_size=ShapeRule(multiple_of=32),
    down_group_size=ShapeRule(multiple_of=32),
    g_idx=ShapeRule(one_of=(0,)),
    down_g_idx=ShapeRule(one_of=(0,)),
)


@hookimpl
def pymllm_kernels() -> list[KernelSpec]:
    nodes = "pymllm_kernels.cpu_nodes"
    return [
        KernelSpec(
            operation="linear",
            name="cpu-avx512-bf16",
            implementation=f"{nodes}:LinearNode",
            needs=_cpu(),
            priority=100,
        ),
        KernelSpec(
            operation="w8a8_linear",
            name="cpu-avx512-vnni",
            implementation=f"{nodes}:W8A8Node",
            # Up to here int32 holds every sum.
            needs=_cpu(K=ShapeRule(maximum=1 << 16)),
            priority=100,
        ),
        *_weight_only(),
        KernelSpec(
            operation="attention_prep",
            name="cpu-avx512-bf16",
            implementation=f"{nodes}:AttentionPrepNode",
            needs=_ATTENTION,
            priority=100,
        ),
        *_triton_kernels(),
        *_cuda_kernels(),
        *_cutlass_kernels(),
    ]


def _triton_kernels() -> list[KernelSpec]:
    nodes = "pymllm_kernels.triton"
    return [
        KernelSpec(
            operation=operation,
            name="triton",
            implementation=f"{nodes}.{implementation}",
            needs=needs,
            priority=100,
        )
        for operation, implementation, needs in (
            ("linear", "linear:TritonLinear", _triton()),
            ("w8a8_linear", "w8a8:TritonW8A8", _triton()),
            (
                "w4a16_linear",
                "w4a16:TritonW4A16",
                _triton(
                    K=ShapeRule(multiple_of=32),
                    group_size=ShapeRule(multiple_of=32),
                    g_idx=ShapeRule(one_of=(0,)),
                ),
            ),
            (
                "w8a16_linear",
                "w8a16:TritonW8A16",
                _triton(group_size=ShapeRule(multiple_of=16), g_idx=ShapeRule(one_of=(0,))),
            ),
            (
                "attention_prep",
                "attention_prep:TritonAttentionPrep",
                _triton(head_dim=ShapeRule(multiple_of=2)),
            ),
            ("moe_route", "moe_route:make_route", _triton()),
            ("embedding", "embedding:make_embedding", _triton(("bfloat16", "float16", "float32"))),
            # Logits are float32, whatever the model computes in.
            ("greedy_step", "greedy_step:TritonGreedyStep", _triton(("bfloat16", "float16", "float32"))),
            ("moe_experts", "moe:TritonExperts", _triton()),
            ("w4a16_moe_experts", "moe:TritonInt4Experts", _INTEGER_EXPERTS),
            ("w8a16_moe_experts", "moe:TritonInt8Experts", _INTEGER_EXPERTS),
            (
                "w8a8_moe_experts",
                "moe_w8a8:TritonW8A8Experts",
                _triton(
                    static=ShapeRule(one_of=(0,)),
                    symmetric=ShapeRule(one_of=(1,)),
                    down_static=ShapeRule(one_of=(0,)),
                    down_symmetric=ShapeRule(one_of=(1,)),
                ),
            ),
        )
    ]


def _cuda_kernels() -> list[KernelSpec]:
    """For few rows; with Triton's, CUTLASS's or cuBLAS's for many."""
    # A block holds a row of x in shared memory.
    longest = 1 << 15
    int4 = {"K": ShapeRule(multiple_of=128, maximum=longest), "g_idx": ShapeRule(one_of=(0,))}
    return [
        KernelSpec(
            operation=operation,
            name=name,
            implementation=f"pymllm_kernels.cuda.few_rows:{implementation}",
            needs=Needs(
                devices=("cuda",),
                capability_min=(8, 0),
                capability_max=(9, 0),
                dtypes=("bfloat16",),
                modules={"triton": "triton"},
                shape=shape,
                check=f"pymllm_kernels.cuda.needs:{check}",
            ),
            priority=200,
        )
        for operation, name, implementation, check, shape in (
            (
                "linear",
                "cuda",
                "CudaLinear",
                "why_not_linear",
                {"K": ShapeRule(multiple_of=8, maximum=longest)},
            ),
            (
                "w8a8_linear",
                "cuda",
                "CudaW8A8",
                "why_not_w8a8",
                {"K": ShapeRule(multiple_of=64, maximum=longest)},
            ),
            (
                "w4a16_linear",
                "cuda",
                "CudaW4A16",
                "why_not_w4a16",
                {**int4, "group_size": ShapeRule(multiple_of=128)},
            ),
            (
                "w4a16_linear",
                "cuda-groups",
                "CudaW4A16",
                "why_not_w4a16",
                {**int4, "group_size": ShapeRule(one_of=(32, 64))},
            ),
        )
    ]


def _cutlass_kernels() -> list[KernelSpec]:
    """One for each dtype, because a library is compiled for one type of result."""
    return [
        KernelSpec(
            operation="w8a8_linear",
            name=name,
            implementation=f"pymllm_kernels.cutlass.w8a8:{implementation}",
            needs=Needs(
                devices=("cuda",),
                capability_min=(8, 0),
                capability_max=(9, 0),
                dtypes=(dtype,),
                modules={"triton": "triton"},
                # int32 holds every sum up to this K.
                shape={"K": ShapeRule(multiple_of=16, maximum=1 << 16), "N": ShapeRule(multiple_of=16)},
                check="pymllm_kernels.cutlass.library:why_not",
            ),
            priority=150,
        )
        for name, dtype, implementation in (
            ("cutlass", "bfloat16", "CutlassW8A8"),
            ("cutlass-float16", "float16", "CutlassW8A8Half"),
        )
    ]


def _weight_only() -> list[KernelSpec]:
    several, one = {"group_size": ShapeRule(multiple_of=8)}, {"groups": ShapeRule(one_of=(1,))}
    return [
        KernelSpec(
            operation=operation,
            name=name,
            implementation=f"pymllm_kernels.cpu_nodes:{node}",
            needs=_cpu(**groups),
            priority=priority,
        )
        for operation, node in (("w4a16_linear", "W4A16Node"), ("w8a16_linear", "W8A16Node"))
        for name, priority, groups in (
            ("cpu-avx512-bf16", 100, several),
            ("cpu-avx512-bf16-channel", 99, one),
        )
    ]


@hookimpl
def pymllm_attention_backends() -> list[AttentionBackendSpec]:
    return [
        AttentionBackendSpec(
            name="cpu",
            implementation="pymllm_kernels.cpu_nodes:CpuAttention",
            needs=_ATTENTION,
            priority=100,
        ),
        AttentionBackendSpec(
            name="flashinfer",
            implementation="pymllm_kernels.flashinfer_attention:FlashInferAttention",
            needs=Needs(
                devices=("cuda",),
                capability_min=(8, 0),
                dtypes=("bfloat16", "float16"),
                modules={"flashinfer": "flashinfer-python", "tvm_ffi": "apache-tvm-ffi"},
                # It compiles its kernels at their first use.
                programs=(("nvcc",), ("ninja",)),
                shape={
                    "head_dim": ShapeRule(one_of=(64, 128, 256)),
                    "same_kv_dtype": ShapeRule(one_of=(1,)),
                },
            ),
            priority=50,
        ),
        AttentionBackendSpec(
            name="cuda",
            implementation="pymllm_kernels.cuda.decode_attention:CudaAttention",
            needs=Needs(
                devices=("cuda",),
                capability_min=(8, 0),
                capability_max=(9, 0),
                dtypes=("bfloat16", "float16"),
                # For prompts.
                modules={"triton": "triton"},
                shape={
                    "head_dim": ShapeRule(one_of=(64, 128)),
                    "group": ShapeRule(maximum=16),
                    "page_size": ShapeRule(one_of=tuple(1 << i for i in range(13))),
                    "same_kv_dtype": ShapeRule(one_of=(1,)),
                },
                check="pymllm_kernels.cuda.decode_library:why_not",
            ),
            priority=150,
        ),
        AttentionBackendSpec(
            name="triton",
            implementation="pymllm_kernels.triton.attention:TritonAttention",
            needs=_triton(head_dim=ShapeRule(one_of=(16, 32, 64, 128, 256))),
            priority=100,
        ),
    ]


@hookimpl
def pymllm_commands() -> list[CommandSpec]:
    return [
        CommandSpec(
            name="kernels",
            implementation="pymllm_kernels.commands:command",
            help="list or compile the kernels",
        )
    ]
