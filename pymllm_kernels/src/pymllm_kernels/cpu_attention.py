"""CPU attention over a paged KV cache, and the fused step before it.

Caches are flat: ``[num_slots, num_kv_heads, head_dim]`` bf16, slot = page * page_size + offset.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pymllm_kernels.cpu_library import cpu_library

if TYPE_CHECKING:
    from collections.abc import Callable

_BF16 = torch.bfloat16


@functools.cache
def _functions() -> tuple[Callable[..., None], Callable[..., None]]:
    """The two C functions, looked up once: an attribute of a CDLL costs a dictionary miss."""
    library = cpu_library()
    return library.pymllm_qk_norm_rope_write, library.pymllm_paged_attention


def qk_norm_rope_write(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Tensor:
    """RMSNorm of q and k per head, rotate-half RoPE, and the write of k and v to the cache.

    The norm rounds as transformers does (normalised value to bf16, product to bf16); the
    rotation is fp32 with one rounding at the end.

    Args:
        qkv: [T, (num_heads + 2 * num_kv_heads) * head_dim] bf16, last dimension contiguous.
        positions: [T] int64, rows of ``cos_sin``.
        cos_sin: [max_positions, head_dim] fp32, first half cosines, second half sines.
        q_weight, k_weight: [head_dim] bf16, or None for no norm.
        eps: of the norm.
        slots: [T] int64; rows with a negative slot are not written.
        k_cache, v_cache: [num_slots, num_kv_heads, head_dim] bf16, contiguous; written.
        num_heads, num_kv_heads, head_dim: ``head_dim`` must be even.

    Returns:
        q: [T, num_heads, head_dim] bf16.

    Raises:
        ValueError: a shape, type or stride does not fit. Positions and slots are not checked
            against the table and the caches.
    """
    tokens, width = qkv.shape
    if (
        width != (num_heads + 2 * num_kv_heads) * head_dim
        or qkv.dtype is not _BF16
        or qkv.stride(1) != 1
        or head_dim % 2
    ):
        raise ValueError(
            f"qkv must be [T, ({num_heads} + 2 * {num_kv_heads}) * {head_dim}] bf16 with an even "
            f"head_dim and a contiguous last dimension, got {tuple(qkv.shape)} {qkv.dtype}"
        )
    if positions.dtype is not torch.int64 or slots.dtype is not torch.int64:
        raise ValueError(f"positions and slots must be int64: {positions.dtype}, {slots.dtype}")
    if positions.numel() != tokens or slots.numel() != tokens:
        raise ValueError(f"{tokens} tokens, {positions.numel()} positions, {slots.numel()} slots")
    if cos_sin.dtype is not torch.float32 or cos_sin.shape[1] != head_dim:
        raise ValueError(f"cos_sin must be [positions, {head_dim}] fp32, got {cos_sin.dtype}")
    _check_caches(k_cache, v_cache, num_kv_heads, head_dim)
    q = torch.empty((tokens, num_heads, head_dim), dtype=_BF16)
    _functions()[0](
        qkv.data_ptr(),
        qkv.stride(0),
        positions.data_ptr(),
        cos_sin.data_ptr(),
        None if q_weight is None else q_weight.data_ptr(),
        None if k_weight is None else k_weight.data_ptr(),
        eps,
        slots.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        q.data_ptr(),
        tokens,
        num_heads,
        num_kv_heads,
        head_dim,
        torch.get_num_threads(),
    )
    return q


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    kv_lens: Tensor,
    page_size: int,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the queries of several sequences over their cached keys.

    Scores and sums are fp32, probabilities are rounded to bf16 before they meet V. A row's
    bits depend only on its own query, keys and position.

    Args:
        q: [T, H, D] bf16, contiguous; rows query_start[s]..query_start[s+1] are sequence s.
        k_cache, v_cache: [num_slots, KVH, D] bf16, contiguous; H a multiple of KVH, D even.
        page_table: [S, max_pages] int32, contiguous.
        query_start: [S + 1] int32.
        kv_lens: [S] int32, keys after this step; query i of n stands at kv_len - n + i, so
            kv_len >= n.
        page_size: tokens in a page.
        scale: factor on q . k.
        out: [T, H, D] bf16 contiguous, written instead of a new tensor.

    Returns:
        [T, H, D] bf16.

    Raises:
        ValueError: a shape, type or stride does not fit. The contents of the tables are not
            checked.
    """
    tokens, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    if q.dtype is not _BF16 or not q.is_contiguous() or heads % kv_heads or dim % 2:
        raise ValueError(
            f"q must be contiguous bf16 [T, H, D] with H a multiple of {kv_heads} and D even, "
            f"got {tuple(q.shape)} {q.dtype}"
        )
    _check_caches(k_cache, v_cache, kv_heads, dim)
    sequences = kv_lens.numel()
    for name, table in (
        ("page_table", page_table),
        ("query_start", query_start),
        ("kv_lens", kv_lens),
    ):
        if table.dtype is not torch.int32 or not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous int32, got {table.dtype}")
    if query_start.numel() != sequences + 1 or page_table.shape[0] != sequences:
        raise ValueError(
            f"{sequences} kv_lens, {query_start.numel()} query_start, {page_table.shape[0]} rows "
            "in page_table"
        )
    if out is None:
        out = torch.empty((tokens, heads, dim), dtype=_BF16)
    elif out.shape != q.shape or out.dtype is not _BF16 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous bf16 {tuple(q.shape)}")
    _functions()[1](
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        page_table.data_ptr(),
        query_start.data_ptr(),
        kv_lens.data_ptr(),
        out.data_ptr(),
        sequences,
        page_table.shape[1],
        page_size,
        heads,
        kv_heads,
        dim,
        scale,
        torch.get_num_threads(),
    )
    return out


def _check_caches(k_cache: Tensor, v_cache: Tensor, kv_heads: int, dim: int) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if (
            cache.dim() != 3
            or cache.shape[1] != kv_heads
            or cache.shape[2] != dim
            or cache.dtype is not _BF16
            or not cache.is_contiguous()
        ):
            raise ValueError(
                f"{name} must be contiguous bf16 [slots, {kv_heads}, {dim}], got "
                f"{tuple(cache.shape)} {cache.dtype}"
            )
