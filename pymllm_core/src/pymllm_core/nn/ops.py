"""The named operations and their definitions in plain torch.

A kernel is a replacement for one of these, chosen by the plan; what it computes is defined here. Norms,
activations and softmax are computed in float32 whatever the dtype of the tensors.

==================  =============================================================================
operation           tensors given to `pack`
==================  =============================================================================
``linear``          ``weight`` [N, K], optional ``bias`` [N]
``w4a16_linear``    ``weight`` [N, 4 ceil(K / 8)] uint8 as in `quant_ops.unpack_int4`, ``scale`` [N, G]
                    in the computation's dtype, optional ``zero_point`` [N, G] int8, ``g_idx`` [K] int32,
                    ``bias``
``w8a16_linear``    ``weight`` [N, K] int8, the rest as ``w4a16_linear``
``w8a8_linear``     ``weight`` [N, K] int8, ``weight_scale`` [N] float32; for static activations
                    ``input_scale`` and, where asymmetric, ``input_zero_point`` (float32, int32, no
                    dimensions); for asymmetric ones ``weight_sum`` [N] int32; optional ``bias``
``embedding``       none; see `embedding`
``attention_prep``  none; see `attention_prep`
``moe_route``       none; see `moe_ops.route`
``moe_experts``     those of ``linear`` for all experts, see `protocols.kernel.ExpertsKernel`; likewise
                    ``w4a16_moe_experts``, ``w8a16_moe_experts`` and ``w8a8_moe_experts``.
                    ``mixed_moe_experts``: experts that are stored unlike, which only linears can serve
``greedy_step``     none; see `step_ops`
==================  =============================================================================

Dimensions by which kernels are chosen, beside ``K`` and ``N``. ``w4a16_linear``, ``w8a16_linear``:
``group_size`` (K where one group is a whole row), ``groups`` (G), ``symmetric`` and ``g_idx`` (0 or 1).
``w8a8_linear``: ``static`` and ``symmetric``, of the activations (0 or 1). Definitions: `quant_ops`.
Those of experts, defined in `moe_ops`: ``experts``, ``top_k``, ``K`` (the hidden size), ``N`` (rows of gate and
up), those of the format for gate and up, and for down with ``down_`` before the name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR = "linear"
EMBEDDING = "embedding"
ATTENTION_PREP = "attention_prep"
W4A16_LINEAR = "w4a16_linear"
W8A16_LINEAR = "w8a16_linear"
W8A8_LINEAR = "w8a8_linear"
MOE_ROUTE = "moe_route"
MIXED_EXPERTS = "mixed_moe_experts"
GREEDY_STEP = "greedy_step"
EXPERTS_OF = {
    LINEAR: "moe_experts",
    W4A16_LINEAR: "w4a16_moe_experts",
    W8A16_LINEAR: "w8a16_moe_experts",
    W8A8_LINEAR: "w8a8_moe_experts",
}
"""The operation of experts whose linears are of this one."""
OPERATIONS = (
    *EXPERTS_OF,
    EMBEDDING,
    ATTENTION_PREP,
    MOE_ROUTE,
    *EXPERTS_OF.values(),
    MIXED_EXPERTS,
    GREEDY_STEP,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang & Sennrich, arXiv:1910.07467).

    The normalised value is rounded to x's dtype before the weight multiplies it, as Qwen3 was trained.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def silu_mul(x: Tensor) -> Tensor:
    """silu(gate) · up of x = [gate, up] along the last dimension (SwiGLU, Shazeer, arXiv:2002.05202)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout. x: [T, H, D]; cos, sin: [T, D / 2] float32."""
    half = x.shape[-1] // 2
    # Rounded to x's dtype first, as transformers does, so that float32 and bf16 both agree with it.
    cos, sin = cos.to(x.dtype)[:, None, :], sin.to(x.dtype)[:, None, :]
    low, high = x[..., :half], x[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


LookUp = Callable[[Tensor, Tensor], Tensor]
"""The operation ``embedding``."""


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, H] by ids [T] int64: [T, H]."""
    return F.embedding(ids, weight)


class AttentionPrep(Protocol):
    """The operation ``attention_prep``: from the fused projection to rotated queries and a filled cache."""

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
    ) -> Tensor: ...


def attention_prep(
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
    """Normalise q and k per head, rotate them, write k and v to the cache, return q [T, H, D].

    qkv: [T, (H + 2 KVH) D]. positions, slots: [T] int64; a token with slot < 0 is not written.
    cos_sin: [max_position, D] float32, cosines then sines. q_weight, k_weight: [D], or None for no norm.
    k_cache, v_cache: [num_slots, KVH, D].
    """
    _, num_kv_heads, head_dim = k_cache.shape
    tokens = qkv.shape[0]
    kv_width = num_kv_heads * head_dim
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_width, kv_width, kv_width), dim=1)
    q = q.view(tokens, -1, head_dim)
    k = k.view(tokens, num_kv_heads, head_dim)
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    cos, sin = cos_sin[positions].chunk(2, dim=-1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    v = v.view(tokens, num_kv_heads, head_dim)
    # Padding tokens (graphs of a fixed size) point at the last slot, which belongs to no page.
    where = torch.where(slots < 0, k_cache.shape[0] - 1, slots)
    k_cache.index_copy_(0, where, k.to(k_cache.dtype))
    v_cache.index_copy_(0, where, v.to(v_cache.dtype))
    return q
