"""Device code of a decode's whole attention node: q/k norm, rotary, cache write and split-KV attention at once.

What `attention_prep` and the decode of `attention_kernels` do in two launches: at a few sequences each of them
is over before the next could have begun, so that the launch itself is what costs. A new token's key and value
go from the projection into the attention through registers, and to the cache beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pymllm_kernels.triton.attention_kernels import merge_splits, slots_of


@triton.jit
def norm_rotate(
    low, high, gain, col, cos, sin, eps, DIM: tl.constexpr, NORM: tl.constexpr, dtype: tl.constexpr
):
    """RMSNorm and rotation of heads [H, DIM / 2] twice, with the roundings of `nn.ops`."""
    if NORM:
        gain_low = tl.load(gain + col).to(tl.float32)[None, :]
        gain_high = tl.load(gain + DIM // 2 + col).to(tl.float32)[None, :]
        scale = tl.rsqrt((tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / DIM + eps)[:, None]
        low = ((low * scale).to(dtype).to(tl.float32) * gain_low).to(dtype).to(tl.float32)
        high = ((high * scale).to(dtype).to(tl.float32) * gain_high).to(dtype).to(tl.float32)
    return (low * cos - high * sin).to(dtype), (high * cos + low * sin).to(dtype)


@triton.jit
def load_block(
    k_at,
    v_at,
    table,
    place,
    end,
    col,
    cache_stride,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    dtype: tl.constexpr,
):
    """Keys and values [BLOCK, HALF], both halves of a head, of the tokens at `place` before `end`."""
    valid = place < end
    slot = slots_of(table, place, valid, PAGE)
    cached = slot[:, None] * cache_stride + col[None, :]
    mask = valid[:, None]
    k_low = tl.load(k_at + cached, mask=mask, other=0.0).to(dtype)
    k_high = tl.load(k_at + cached + HALF, mask=mask, other=0.0).to(dtype)
    v_low = tl.load(v_at + cached, mask=mask, other=0.0).to(dtype)
    v_high = tl.load(v_at + cached + HALF, mask=mask, other=0.0).to(dtype)
    return k_low, k_high, v_low, v_high


@triton.jit
def attend_block(top, total, acc_low, acc_high, q_low, q_high, k_low, k_high, v_low, v_high, valid, scale):
    """One step of the running softmax over a block of keys."""
    scores = tl.dot(q_low, tl.trans(k_low))
    scores = tl.dot(q_high, tl.trans(k_high), scores) * scale
    scores = tl.where(valid[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    p = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, axis=1)
    p = p.to(q_low.dtype)
    acc_low = tl.dot(p, v_low, acc_low * shrink[:, None])
    acc_high = tl.dot(p, v_high, acc_high * shrink[:, None])
    return new_top, total, acc_low, acc_high


@triton.jit(do_not_specialize=["table_stride"])
def prepare_and_decode_kernel(
    qkv,
    positions,
    cos_sin,
    q_weight,
    k_weight,
    eps,
    slots,
    k_cache,
    v_cache,
    out,
    page_table,
    kv_lens,
    partial,
    stats,
    counters,
    scale,
    qkv_stride,
    cache_stride,
    table_stride,
    DIM: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    STAGES: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    """One new token a sequence. Program (split, KV head, sequence) attends over a part of the cache.

    The tokens before the new one are divided among the splits in blocks of BLOCK, at least LEAST a split, and
    the last split that has any takes the new token as well, and writes it to the cache. The last program to
    arrive merges, as in `attention_kernels.decode_kernel`.
    """
    HALF: tl.constexpr = DIM // 2
    HEADS: tl.constexpr = KV_HEADS * GROUP
    if PDL:
        gdc_launch_dependents()
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # Lengths, tables and the cache of earlier steps are there before the step's first kernel.
    old = tl.load(kv_lens + sequence) - 1
    blocks = tl.cdiv(old, BLOCK)
    each = tl.maximum(tl.cdiv(blocks, SPLITS), LEAST)
    active = tl.maximum(tl.cdiv(blocks, each), 1)
    if split >= active:
        return
    begin = split * each * BLOCK
    end = tl.minimum(begin + each * BLOCK, old)
    row = tl.arange(0, BLOCK_G)
    col = tl.arange(0, HALF)
    column = tl.arange(0, BLOCK)
    table = page_table + sequence * table_stride
    position = tl.load(positions + sequence)
    dtype: tl.constexpr = out.dtype.element_ty
    k_at, v_at = k_cache + kv_head * DIM, v_cache + kv_head * DIM
    # The first block is on its way before the projection is there.
    k_low, k_high, v_low, v_high = load_block(
        k_at, v_at, table, begin + column, end, col, cache_stride, PAGE, HALF, dtype
    )
    angle = cos_sin + position * DIM + col
    cos = tl.load(angle).to(dtype).to(tl.float32)[None, :]
    sin = tl.load(angle + HALF).to(dtype).to(tl.float32)[None, :]
    if PDL:
        gdc_wait()
    mine = (row < GROUP)[:, None]
    q_at = qkv + sequence * qkv_stride + (kv_head * GROUP + row)[:, None] * DIM + col[None, :]
    low = tl.load(q_at, mask=mine, other=0.0).to(tl.float32)
    high = tl.load(q_at + HALF, mask=mine, other=0.0).to(tl.float32)
    q_low, q_high = norm_rotate(low, high, q_weight, col, cos, sin, eps, DIM, Q_NORM, dtype)
    top = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    acc_low = tl.zeros((BLOCK_G, HALF), dtype=tl.float32)
    acc_high = tl.zeros((BLOCK_G, HALF), dtype=tl.float32)
    if begin < end:
        valid = begin + column < end
        top, total, acc_low, acc_high = attend_block(
            top, total, acc_low, acc_high, q_low, q_high, k_low, k_high, v_low, v_high, valid, scale
        )
    for start in tl.range(begin + BLOCK, end, BLOCK, num_stages=STAGES):
        k_low, k_high, v_low, v_high = load_block(
            k_at, v_at, table, start + column, end, col, cache_stride, PAGE, HALF, dtype
        )
        valid = start + column < end
        top, total, acc_low, acc_high = attend_block(
            top, total, acc_low, acc_high, q_low, q_high, k_low, k_high, v_low, v_high, valid, scale
        )
    if split == active - 1:
        one = tl.arange(0, 1)
        new_at = qkv + sequence * qkv_stride + (HEADS + kv_head + one)[:, None] * DIM + col[None, :]
        raw_low, raw_high = tl.load(new_at).to(tl.float32), tl.load(new_at + HALF).to(tl.float32)
        new_low, new_high = norm_rotate(raw_low, raw_high, k_weight, col, cos, sin, eps, DIM, K_NORM, dtype)
        new_at += KV_HEADS * DIM
        value_low, value_high = tl.load(new_at), tl.load(new_at + HALF)
        # A token with a negative slot is padding and is written nowhere.
        home = tl.load(slots + sequence)
        to = home * cache_stride + (kv_head + one)[:, None] * DIM + col[None, :]
        element: tl.constexpr = k_cache.dtype.element_ty
        if home >= 0:
            tl.store(k_cache + to, new_low.to(element))
            tl.store(k_cache + to + HALF, new_high.to(element))
            tl.store(v_cache + to, value_low.to(element))
            tl.store(v_cache + to + HALF, value_high.to(element))
        score = tl.sum(q_low.to(tl.float32) * new_low.to(tl.float32), axis=1)
        score = (score + tl.sum(q_high.to(tl.float32) * new_high.to(tl.float32), axis=1)) * scale
        last_top = tl.maximum(top, score)
        weight = tl.exp2(score - last_top)
        last_shrink = tl.exp2(top - last_top)
        total = total * last_shrink + weight
        acc_low = acc_low * last_shrink[:, None] + weight[:, None] * value_low.to(tl.float32)
        acc_high = acc_high * last_shrink[:, None] + weight[:, None] * value_high.to(tl.float32)
        top = last_top
    if active == 1:
        o_at = out + sequence * (HEADS * DIM) + (kv_head * GROUP + row)[:, None] * DIM + col[None, :]
        tl.store(o_at, (acc_low / total[:, None]).to(dtype), mask=mine)
        tl.store(o_at + HALF, (acc_high / total[:, None]).to(dtype), mask=mine)
    else:
        place = sequence * KV_HEADS + kv_head
        first = place * SPLITS
        part = (first + split) * GROUP + row
        tl.store(partial + part[:, None] * DIM + col[None, :], acc_low, mask=mine)
        tl.store(partial + part[:, None] * DIM + HALF + col[None, :], acc_high, mask=mine)
        tl.store(stats + part * 2, top, mask=row < GROUP)
        tl.store(stats + part * 2 + 1, total, mask=row < GROUP)
        # All threads' stores come before the release of the one that counts.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu")
        if arrived == active - 1:
            tl.store(counters + place, 0)
            to_out = out + sequence * (HEADS * DIM) + kv_head * GROUP * DIM
            merge_splits(partial, stats, to_out, first, active, DIM, GROUP, SPLITS)
