"""The attention node: q/k norm, rotary, cache write and attention, as one call."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from pymllm_core.nn.norm import RMSNorm
from pymllm_core.nn.ops import AttentionPrep
from pymllm_core.nn.rope import Rotary
from pymllm_core.protocols.attention import ForwardContext, PreparingBackend


class Attention:
    """Attention of decoder layer `layer` over the paged cache."""

    __slots__ = ("_k_norm", "_prep", "_q_norm", "_rotary", "layer")

    def __init__(
        self,
        layer: int,
        prep: AttentionPrep,
        rotary: Rotary,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> None:
        self.layer = layer
        self._prep = prep
        self._rotary = rotary
        self._q_norm = q_norm
        self._k_norm = k_norm

    def __call__(self, qkv: Tensor, ctx: ForwardContext) -> Tensor:
        """qkv: [T, (num_heads + 2 num_kv_heads) head_dim]. Returns [T, num_heads head_dim]."""
        kv, backend, tokens = ctx.kv[self.layer], ctx.attention, qkv.shape[0]
        q_norm, k_norm = self._q_norm, self._k_norm
        q_weight = None if q_norm is None else q_norm.weight
        k_weight = None if k_norm is None else k_norm.weight
        eps = 0.0 if q_norm is None else q_norm.eps
        table = self._rotary.table
        if backend.prepares_decodes and ctx.num_decodes == tokens:
            whole = cast(PreparingBackend, backend)
            return whole.prepare_and_attend(qkv, table, q_weight, k_weight, eps, kv, ctx).view(tokens, -1)
        q = self._prep(qkv, ctx.positions, table, q_weight, k_weight, eps, ctx.slots, kv.k, kv.v)
        return backend.attend(q, kv, ctx).view(tokens, -1)
