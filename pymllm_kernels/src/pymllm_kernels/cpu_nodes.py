"""The CPU kernels in the form in which the core asks for them. Nothing is compiled before its first use."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV
from pymllm_core.protocols.kernel import Norm
from pymllm_kernels import cpu
from pymllm_kernels.cpu_attention import paged_attention, qk_norm_rope_write
from pymllm_kernels.cpu_linear import CpuLinear, PackedLinear


class LinearNode:
    """The operation ``linear`` for bf16, whole nodes in one call (`protocols.kernel.LinearKernel`)."""

    fuses = CpuLinear.fuses

    @cached_property
    def _kernel(self) -> CpuLinear:
        return CpuLinear()

    def pack(self, tensors: dict[str, Tensor], *, act: str | None) -> PackedLinear:
        return self._kernel.pack(tensors["weight"], bias=tensors.get("bias"), act=act)

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
    return "a linear and an attention agree with float64 on the CPU"
