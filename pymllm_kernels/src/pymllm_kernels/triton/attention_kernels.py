"""Device code of paged attention: split-KV decode and FlashAttention-2 prefill (arXiv:2307.08691).

Softmax runs in base 2 over float32 scores: `scale` is the attention's scale times log2(e). A token's keys
lie at ``page_table[sequence, position // PAGE] * PAGE + position % PAGE``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def slots_of(table, position, valid, PAGE: tl.constexpr):
    page = tl.load(table + position // PAGE, mask=valid, other=0).to(tl.int64)
    return page * PAGE + position % PAGE


@triton.jit
def merge_splits(
    partial,
    stats,
    out,
    first,
    active,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Weigh the results of a sequence's splits and store one [GROUP, DIM]. first: the row of split 0."""
    split = tl.arange(0, SPLITS)
    valid = split < active
    d = tl.arange(0, DIM)
    for head in tl.static_range(GROUP):
        row = (first + split) * GROUP + head
        # From L2: the first-level cache is not coherent with what other multiprocessors wrote.
        top = tl.load(stats + row * 2, mask=valid, other=float("-inf"), cache_modifier=".cg")
        total = tl.load(stats + row * 2 + 1, mask=valid, other=0.0, cache_modifier=".cg")
        at = partial + row[:, None] * DIM + d[None, :]
        acc = tl.load(at, mask=valid[:, None], other=0.0, cache_modifier=".cg")
        share = tl.exp2(top - tl.max(top, axis=0))
        y = tl.sum(acc * share[:, None], axis=0) / tl.sum(total * share, axis=0)
        tl.store(out + head * DIM + d, y.to(out.dtype.element_ty))


@triton.jit
def softmax_step(top, total, scores):
    """Add scores [rows, keys] to the running softmax: its new state, their weights, what earlier sums shrink by."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    p = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return new_top, total * shrink + tl.sum(p, axis=1), p, shrink


@triton.jit(do_not_specialize=["table_stride"])
def decode_kernel(
    q,
    k_cache,
    v_cache,
    out,
    page_table,
    kv_lens,
    partial,
    stats,
    counters,
    scale,
    q_stride,
    cache_stride,
    table_stride,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query token a sequence. Program (split, KV head, sequence) attends over a part of the cache.

    The group's query heads are the rows of one product, padded to BLOCK_G. A sequence's splits share its
    blocks of BLOCK tokens evenly; those it has none for exit at once. The last to arrive, by a counter that it
    sets back to zero, merges: partial [.., GROUP, DIM] and stats [.., GROUP, 2] are float32.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    split, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_len = tl.load(kv_lens + sequence)
    blocks = tl.cdiv(kv_len, BLOCK)
    each = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
    active = tl.maximum(tl.cdiv(blocks, each), 1)
    if split >= active:
        return
    begin = split * each * BLOCK
    end = tl.minimum(begin + each * BLOCK, kv_len)
    row = tl.arange(0, BLOCK_G)
    d = tl.arange(0, DIM)
    column = tl.arange(0, BLOCK)
    heads = kv_head * GROUP + row
    q_at = q + sequence.to(tl.int64) * q_stride + heads[:, None] * DIM + d[None, :]
    query = tl.load(q_at, mask=(row < GROUP)[:, None], other=0.0)
    table = page_table + sequence.to(tl.int64) * table_stride
    top = tl.full((BLOCK_G,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_G,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_G, DIM), dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        position = start + column
        valid = position < end
        slot = slots_of(table, position, valid, PAGE)
        at = slot[:, None] * cache_stride + kv_head * DIM + d[None, :]
        k = tl.load(k_cache + at, mask=valid[:, None], other=0.0).to(query.dtype)
        v = tl.load(v_cache + at, mask=valid[:, None], other=0.0).to(query.dtype)
        scores = tl.where(valid[None, :], tl.dot(query, tl.trans(k)) * scale, float("-inf"))
        top, total, p, shrink = softmax_step(top, total, scores)
        acc = tl.dot(p.to(query.dtype), v, acc * shrink[:, None])
    if active == 1:
        # Padding of a graph may have no tokens at all: zeros.
        y = acc / tl.where(total > 0, total, 1.0)[:, None]
        o_at = out + sequence.to(tl.int64) * q_stride + heads[:, None] * DIM + d[None, :]
        tl.store(o_at, y.to(out.dtype.element_ty), mask=(row < GROUP)[:, None])
    else:
        place = sequence * tl.num_programs(1) + kv_head
        first = place * SPLITS
        mine = (first + split) * GROUP + row
        tl.store(partial + mine[:, None] * DIM + d[None, :], acc, mask=(row < GROUP)[:, None])
        tl.store(stats + mine * 2, top, mask=row < GROUP)
        tl.store(stats + mine * 2 + 1, total, mask=row < GROUP)
        # All threads' stores come before the release of the one that counts.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu")
        if arrived == active - 1:
            tl.store(counters + place, 0)
            to = out + sequence.to(tl.int64) * q_stride + kv_head * GROUP * DIM
            merge_splits(partial, stats, to, first, active, DIM, GROUP, SPLITS)


@triton.jit(do_not_specialize=["first_sequence", "table_stride"])
def prefill_kernel(
    q,
    k_cache,
    v_cache,
    out,
    page_table,
    kv_lens,
    query_start,
    first_sequence,
    scale,
    q_stride,
    cache_stride,
    table_stride,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (query head, block of BLOCK_M queries, sequence): causal, a sequence's queries are its last tokens."""
    head, sequence = tl.program_id(0), first_sequence + tl.program_id(2)
    # The blocks with the most keys first.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    q_begin = tl.load(query_start + sequence)
    q_len = tl.load(query_start + sequence + 1) - q_begin
    if block * BLOCK_M >= q_len:
        return
    kv_len = tl.load(kv_lens + sequence)
    kv_head = head // GROUP
    table = page_table + sequence.to(tl.int64) * table_stride
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, DIM)
    at = (q_begin + m).to(tl.int64)[:, None] * q_stride + head * DIM + d[None, :]
    query = tl.load(q + at, mask=(m < q_len)[:, None], other=0.0)
    before = kv_len - q_len
    positions = before + m
    # Keys up to the block's first query are seen by all of its queries: they need no masks, the others do.
    whole = (before + block * BLOCK_M + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(before + (block + 1) * BLOCK_M, kv_len)
    acc = tl.zeros((BLOCK_M, DIM), dtype=tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for masked in tl.static_range(2):
        begin, stop = whole if masked else 0, end if masked else whole
        for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
            position = start + tl.arange(0, BLOCK_N)
            valid = position < kv_len
            slot = slots_of(table, position, valid, PAGE)
            cached = slot[:, None] * cache_stride + kv_head * DIM + d[None, :]
            mask, other = valid[:, None] if masked else None, 0.0 if masked else None
            k = tl.load(k_cache + cached, mask=mask, other=other).to(query.dtype)
            scores = tl.dot(query, tl.trans(k)) * scale
            if masked:
                scores = tl.where(position[None, :] <= positions[:, None], scores, float("-inf"))
            top, total, p, shrink = softmax_step(top, total, scores)
            v = tl.load(v_cache + cached, mask=mask, other=other).to(query.dtype)
            acc = tl.dot(p.to(query.dtype), v, acc * shrink[:, None])
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=(m < q_len)[:, None])
