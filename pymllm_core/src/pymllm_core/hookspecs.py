"""The hooks. Each collects specs from every plugin; none may import torch or do any work."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from pymllm_core.specs import (
    AttentionBackendSpec,
    CachePolicySpec,
    CommandSpec,
    KernelSpec,
    ModelSourceSpec,
    ModelSpec,
    OutputParserSpec,
    QuantMethodSpec,
    Spec,
)

PROJECT = "pymllm"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def pymllm_models() -> Iterable[ModelSpec]:  # type: ignore[empty-body]
    """Model architectures that this plugin implements."""


@hookspec
def pymllm_quant_methods() -> Iterable[QuantMethodSpec]:  # type: ignore[empty-body]
    """Quantisation formats that this plugin reads and executes."""


@hookspec
def pymllm_attention_backends() -> Iterable[AttentionBackendSpec]:  # type: ignore[empty-body]
    """Attention over the paged KV cache."""


@hookspec
def pymllm_cache_policies() -> Iterable[CachePolicySpec]:  # type: ignore[empty-body]
    """Policies that decide which KV pages are shared, kept and evicted."""


@hookspec
def pymllm_kernels() -> Iterable[KernelSpec]:  # type: ignore[empty-body]
    """Implementations of the named operations of `pymllm_core.nn.ops`."""


@hookspec
def pymllm_output_parsers() -> Iterable[OutputParserSpec]:  # type: ignore[empty-body]
    """Parsers that split generated text into content, reasoning and tool calls."""


@hookspec
def pymllm_model_sources() -> Iterable[ModelSourceSpec]:  # type: ignore[empty-body]
    """Places that model names are looked up in."""


@hookspec
def pymllm_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Sub-commands of the ``pymllm`` program."""


HOOKS: dict[str, type[Spec]] = {
    "pymllm_models": ModelSpec,
    "pymllm_quant_methods": QuantMethodSpec,
    "pymllm_attention_backends": AttentionBackendSpec,
    "pymllm_cache_policies": CachePolicySpec,
    "pymllm_kernels": KernelSpec,
    "pymllm_output_parsers": OutputParserSpec,
    "pymllm_model_sources": ModelSourceSpec,
    "pymllm_commands": CommandSpec,
}
"""Every hook with the type of spec that it collects."""
