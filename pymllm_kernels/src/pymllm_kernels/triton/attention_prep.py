"""The operation ``attention_prep``: q/k norm, rotary embedding and cache write in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_kernels.triton.launch import ceil_div, gpu, name_the_compiler, power_of_2


@triton.jit
def normalise(low, high, gain_low, gain_high, eps, dtype: tl.constexpr, DIM: tl.constexpr):
    """RMSNorm of heads whose halves are low and high, with the roundings of `nn.ops.rms_norm`."""
    scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / DIM + eps)[:, None]
    low = ((low * scale).to(dtype).to(tl.float32) * gain_low).to(dtype).to(tl.float32)
    high = ((high * scale).to(dtype).to(tl.float32) * gain_high).to(dtype).to(tl.float32)
    return low, high


@triton.jit
def attention_prep_kernel(
    qkv,
    positions,
    cos_sin,
    q_weight,
    k_weight,
    eps,
    slots,
    k_cache,
    v_cache,
    q_out,
    qkv_stride,
    cache_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes BLOCK_H heads of one token; which are of q, k or v is decided head by head."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    col = tl.arange(0, BLOCK_HALF)
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (col < HALF)[None, :]
    is_q = (head < HEADS)[:, None]
    is_v = (head >= HEADS + KV_HEADS)[:, None]
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    dtype: tl.constexpr = q_out.dtype.element_ty
    at = qkv + token * qkv_stride + head[:, None] * DIM + col[None, :]
    low = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    # Rounded to the computation's dtype first, as `nn.ops.rotate` does.
    angle = cos_sin + position * DIM + col
    cos = tl.load(angle, mask=col < HALF, other=0.0).to(dtype).to(tl.float32)[None, :]
    sin = tl.load(angle + HALF, mask=col < HALF, other=0.0).to(dtype).to(tl.float32)[None, :]
    x, y = low, high
    if Q_NORM:
        gain_low = tl.load(q_weight + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
        gain_high = tl.load(q_weight + HALF + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
        q_low, q_high = normalise(low, high, gain_low, gain_high, eps, dtype, DIM)
        x, y = tl.where(is_q, q_low, x), tl.where(is_q, q_high, y)
    if K_NORM:
        gain_low = tl.load(k_weight + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
        gain_high = tl.load(k_weight + HALF + col, mask=col < HALF, other=0.0).to(tl.float32)[None, :]
        k_low, k_high = normalise(low, high, gain_low, gain_high, eps, dtype, DIM)
        x, y = tl.where(is_q, x, k_low), tl.where(is_q, y, k_high)
    turned_low, turned_high = x * cos - y * sin, y * cos + x * sin
    to_q = q_out + token * (HEADS * DIM) + head[:, None] * DIM + col[None, :]
    tl.store(to_q, turned_low.to(dtype), mask=inside & is_q)
    tl.store(to_q + HALF, turned_high.to(dtype), mask=inside & is_q)
    # A token with a negative slot is padding and is written nowhere.
    cached: tl.constexpr = k_cache.dtype.element_ty
    kept = inside & (slot >= 0)
    to_k = k_cache + slot * cache_stride + (head - HEADS)[:, None] * DIM + col[None, :]
    is_k = kept & (head >= HEADS)[:, None] & (head < HEADS + KV_HEADS)[:, None]
    tl.store(to_k, turned_low.to(dtype).to(cached), mask=is_k)
    tl.store(to_k + HALF, turned_high.to(dtype).to(cached), mask=is_k)
    to_v = v_cache + slot * cache_stride + (head - HEADS - KV_HEADS)[:, None] * DIM + col[None, :]
    tl.store(to_v, low.to(cached), mask=kept & is_v)
    tl.store(to_v + HALF, high.to(cached), mask=kept & is_v)


class TritonAttentionPrep:
    """`nn.ops.AttentionPrep`; the caches lie without gaps, a token after another."""

    def __init__(self) -> None:
        # Here, because every model with attention makes this node, before any weight is loaded.
        name_the_compiler()

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
        tokens = qkv.shape[0]
        _, kv_heads, dim = k_cache.shape
        heads = qkv.shape[1] // dim - 2 * kv_heads
        q = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=qkv.device)
        if not tokens:
            return q
        total = heads + 2 * kv_heads
        # Two heads a program keep a single token on many multiprocessors; eight make fewer programs of many.
        block = min(8 if tokens > 64 else 2, power_of_2(total))
        pdl = gpu(qkv.device).pdl
        attention_prep_kernel[(tokens, ceil_div(total, block))](
            qkv if qkv.stride(1) == 1 else qkv.contiguous(),
            positions,
            cos_sin,
            q_weight,
            k_weight,
            eps,
            slots,
            k_cache,
            v_cache,
            q,
            qkv.stride(0) if qkv.stride(1) == 1 else qkv.shape[1],
            k_cache.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            DIM=dim,
            BLOCK_H=block,
            BLOCK_HALF=power_of_2(dim // 2),
            Q_NORM=q_weight is not None,
            K_NORM=k_weight is not None,
            PDL=pdl,
            num_warps=1 if block == 2 else 4,
            launch_pdl=pdl,
        )
        return q
