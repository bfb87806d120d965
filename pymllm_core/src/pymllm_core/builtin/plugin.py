"""What the core itself registers, through the same hooks as everybody else."""

from __future__ import annotations

from pymllm_core.hookspecs import hookimpl
from pymllm_core.specs import (
    AttentionBackendSpec,
    CachePolicySpec,
    CommandSpec,
    KernelSpec,
    ModelSourceSpec,
    Needs,
    ShapeRule,
)

CONTRACT = "1.0"


@hookimpl
def pymllm_attention_backends() -> list[AttentionBackendSpec]:
    return [
        AttentionBackendSpec(
            name="pytorch", implementation="pymllm_core.builtin.torch_attention:TorchAttention"
        )
    ]


@hookimpl
def pymllm_cache_policies() -> list[CachePolicySpec]:
    return [
        CachePolicySpec(name="radix", implementation="pymllm_core.kv.radix:RadixCache", priority=10),
        CachePolicySpec(name="chunk", implementation="pymllm_core.kv.chunk:ChunkCache"),
    ]


@hookimpl
def pymllm_kernels() -> list[KernelSpec]:
    kernels = "pymllm_core.builtin.torch_kernels"
    return [
        KernelSpec(operation="linear", name="torch", implementation=f"{kernels}:TorchLinear"),
        KernelSpec(
            operation="linear",
            name="onednn",
            implementation=f"{kernels}:OneDnnLinear",
            # Reordering odd sizes falls back to slow reference paths.
            needs=Needs(
                devices=("cpu",),
                dtypes=("bfloat16",),
                cpu_flags=("avx512bw",),
                shape={"K": ShapeRule(multiple_of=16), "N": ShapeRule(multiple_of=16)},
            ),
            priority=10,
        ),
        *(
            KernelSpec(
                operation=operation, name="torch", implementation=f"pymllm_core.builtin.torch_quant:{name}"
            )
            for operation, name in (
                ("w4a16_linear", "TorchW4A16"),
                ("w8a16_linear", "TorchW8A16"),
                ("w8a8_linear", "TorchW8A8"),
            )
        ),
        *_cpu_quantised(),
        KernelSpec(operation="embedding", name="torch", implementation=f"{kernels}:torch_embedding"),
        KernelSpec(
            operation="attention_prep", name="torch", implementation=f"{kernels}:torch_attention_prep"
        ),
        KernelSpec(operation="moe_route", name="torch", implementation=f"{kernels}:torch_route"),
        KernelSpec(
            operation="greedy_step", name="torch", implementation="pymllm_core.nn.step_ops:TorchGreedyStep"
        ),
        *(
            KernelSpec(operation=operation, name="one-by-one", implementation="pymllm_core.nn.moe:OneByOne")
            for operation in (
                "moe_experts",
                "w4a16_moe_experts",
                "w8a16_moe_experts",
                "w8a8_moe_experts",
                "mixed_moe_experts",
            )
        ),
    ]


def _cpu_quantised() -> list[KernelSpec]:
    """torch's own CPU operators, each for the shapes that it was found to be right and fast for."""
    zero = ShapeRule(one_of=(0,))
    of_16 = ShapeRule(multiple_of=16)
    int8 = "pymllm_core.builtin.cpu_int8"
    return [
        *(
            KernelSpec(
                operation="w4a16_linear",
                name=name,
                implementation="pymllm_core.builtin.cpu_int4:Int4PackLinear",
                needs=Needs(
                    devices=("cpu",),
                    dtypes=("bfloat16", "float16"),
                    cpu_flags=("avx2",),
                    shape={"N": of_16, "K": ShapeRule(multiple_of=32), "g_idx": zero, **groups},
                ),
                priority=priority,
            )
            for name, priority, groups in (
                ("int4pack", 10, {"group_size": ShapeRule(one_of=(32, 64, 128, 256))}),
                ("int4pack-channel", 9, {"groups": ShapeRule(one_of=(1,))}),
            )
        ),
        KernelSpec(
            operation="w8a16_linear",
            name="int8pack",
            implementation=f"{int8}:Int8PackLinear",
            needs=Needs(
                devices=("cpu",),
                dtypes=("bfloat16",),
                cpu_flags=("avx2",),
                # The operator reads past the end where K is no multiple of 16.
                shape={
                    "K": of_16,
                    "groups": ShapeRule(one_of=(1,)),
                    "symmetric": ShapeRule(one_of=(1,)),
                    "g_idx": zero,
                },
            ),
            priority=10,
        ),
        KernelSpec(
            operation="w8a8_linear",
            name="onednn",
            implementation=f"{int8}:OneDnnInt8Linear",
            # Without VNNI, sums of two products saturate at 16 bits.
            needs=Needs(devices=("cpu",), cpu_flags=("avx512_vnni",)),
            priority=10,
        ),
    ]


@hookimpl
def pymllm_model_sources() -> list[ModelSourceSpec]:
    sources = "pymllm_core.builtin.sources"
    return [
        ModelSourceSpec(
            name="path", implementation=f"{sources}:resolve_path", priority=30, describes="a local folder"
        ),
        ModelSourceSpec(
            name="huggingface",
            implementation=f"{sources}:resolve_huggingface",
            priority=10,
            describes="ORG/NAME or hf:ORG/NAME",
        ),
        ModelSourceSpec(
            name="modelscope",
            implementation=f"{sources}:resolve_modelscope",
            priority=20,
            describes="modelscope:ORG/NAME, or ORG/NAME where PYMLLM_USE_MODELSCOPE=1",
        ),
    ]


@hookimpl
def pymllm_commands() -> list[CommandSpec]:
    helps = {
        "plugins": "what is installed and what failed",
        "plan": "what would serve a model, and why",
        "lint-checkpoint": "check a checkpoint before it is loaded",
        "doctor": "check this machine",
        "generate": "answer one prompt",
        "chat": "talk to a model in the terminal",
        "bench": "measure one batch, or a server under load",
        "version": "versions of everything",
    }
    return [
        CommandSpec(
            name=name, implementation=f"pymllm_core.commands.{name.replace('-', '_')}:command", help=text
        )
        for name, text in helps.items()
    ]
