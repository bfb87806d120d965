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
        KernelSpec(
            operation="attention_prep", name="torch", implementation=f"{kernels}:torch_attention_prep"
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
        "doctor": "check this machine",
        "generate": "answer one prompt",
        "chat": "talk to a model in the terminal",
        "version": "versions of everything",
    }
    return [
        CommandSpec(name=name, implementation=f"pymllm_core.commands.{name}:command", help=text)
        for name, text in helps.items()
    ]
