"""The CPU kernels in the form in which the core asks for them. Nothing is compiled before its first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV
from pymllm_core.protocols.kernel import Norm
from pymllm_kernels import cpu
from pymllm_kernels.cpu_attention import paged_attention, qk_norm_rope_write
from pymllm_kernels.cpu_linear import CpuLinear
from pymllm_kernels.cpu_tiles import PackedLinear, TiledLinear
from pymllm_kernels.cpu_w8a8 import CpuW8A8Linear
from pymllm_kernels.cpu_weight_only import CpuWeightOnlyLinear

KernelT = TypeVar("KernelT", bound=TiledLinear)


class _Node(Generic[KernelT]):
    """A linear as a whole node (`protocols.kernel.LinearKernel`)."""

    fuses = TiledLinear.fuses
    _make: Callable[[], KernelT]

    @cached_property
    def _kernel(self) -> KernelT:
        return type(self)._make()

    def apply(
        self,
        x: Tensor,
        packed: PackedLinear,
        *,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        return self._kernel.apply(x, packed, norm=norm, residual=residual, out_dtype=out_dtype)


class LinearNode(_Node[CpuLinear]):
    """The operation ``linear`` for bf16."""

    _make = CpuLinear

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> PackedLinear:
        return self._kernel.pack(tensors["weight"], bias=tensors.get("bias"), act=act)


class W8A8Node(_Node[CpuW8A8Linear]):
    """The operation ``w8a8_linear`` for bf16 activations."""

    _make = CpuW8A8Linear

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> PackedLinear:
        return self._kernel.pack(tensors, act=act)


class _WeightOnlyNode(_Node[CpuWeightOnlyLinear]):
    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> PackedLinear:
        return self._kernel.pack(tensors, act=act)


class W4A16Node(_WeightOnlyNode):
    """The operation ``w4a16_linear`` for bf16 activations."""

    _make = partial(CpuWeightOnlyLinear, 4)


class W8A16Node(_WeightOnlyNode):
    """The operation ``w8a16_linear`` for bf16 activations."""

    _make = partial(CpuWeightOnlyLinear, 8)


class AttentionPrepNode:
    """The operation ``attention_prep`` for bf16 (`nn.ops.AttentionPrep`)."""

    def __call__(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        _, num_kv_heads, head_dim = k_cache.shape
        num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
        return qk_norm_rope_write(
            qkv,
            positions,
            cos_sin,
            q_weight,
            k_weight,
            eps,
            slots,
            k_cache,
            v_cache,
            num_heads,
            num_kv_heads,
            head_dim,
        )


class CpuAttention:
    """Paged attention for bf16 (`protocols.attention.AttentionBackend`)."""

    graph_safe = False  # no graphs on a CPU
    prepares_decodes = False

    def __init__(self, config: AttentionConfig) -> None:
        self._page_size = config.page_size
        self._scale = config.scale

    def plan(self, ctx: ForwardContext) -> None:
        """Nothing to prepare: the kernel reads the tables itself."""

    def attend(self, q: Tensor, kv: LayerKV, ctx: ForwardContext) -> Tensor:
        return paged_attention(
            q, kv.k, kv.v, ctx.page_table, ctx.query_start, ctx.kv_lens, self._page_size, self._scale
        )


def self_check() -> str:
    """Compile the kernels if need be and run two; what was done, for ``pymllm doctor``."""
    cpu.self_check()
    return "linears of every format and an attention agree with float64 on the CPU"
