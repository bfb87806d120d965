"""Attention and its preparation, for `gpu_kernels.py`."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from gpu_timing import Report, Shape, copies_of
from torch import Tensor

from pymllm_core.nn import ops
from pymllm_core.protocols.attention import AttentionConfig, ForwardContext, LayerKV
from pymllm_kernels.triton.attention import TritonAttention
from pymllm_kernels.triton.attention_prep import TritonAttentionPrep

DEVICE = torch.device("cuda")
BF16 = torch.bfloat16


def context(queries: list[int], kv: list[int], backend: Any, slots: int) -> ForwardContext:
    """A pass whose pages of 16 tokens are scattered over the cache."""
    tokens, width = sum(queries), -(-max(kv) // 16)
    table = torch.randperm(slots // 16, device=DEVICE).int()
    ids = torch.arange(len(kv) * width, device=DEVICE) % table.numel()
    return ForwardContext(
        positions=torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
        slots=torch.arange(tokens, device=DEVICE),
        query_start=torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32, device=DEVICE),
        kv_lens=torch.tensor(kv, dtype=torch.int32, device=DEVICE),
        page_table=table[ids].view(len(kv), width).contiguous(),
        num_decodes=sum(count == 1 for count in queries),
        query_lens=queries,
        kv_lens_host=kv,
        page_size=16,
        kv=[],
        attention=backend,
    )


def attention_reference(q: Tensor, kv: LayerKV, ctx: ForwardContext, index: int) -> Tensor:
    """The sequence `index` in float64."""
    length, count = ctx.kv_lens_host[index], ctx.query_lens[index]
    position = torch.arange(length, device=DEVICE)
    slots = ctx.page_table[index, position // 16].long() * 16 + position % 16
    group = q.shape[1] // kv.k.shape[1]
    k, v = (cache[slots].double().repeat_interleave(group, 1).transpose(0, 1) for cache in (kv.k, kv.v))
    first = sum(ctx.query_lens[:index])
    scores = q[first : first + count].double().transpose(0, 1) @ k.transpose(1, 2) * q.shape[2] ** -0.5
    seen = position[None] <= torch.arange(length - count, length, device=DEVICE)[:, None]
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v).transpose(0, 1)


def bench_attention(
    report: Report, model: str, shape: Shape, queries: list[int], kv_len: int, *, tried: bool
) -> None:
    config = AttentionConfig(shape.heads, shape.kv_heads, shape.dim, 16, shape.dim**-0.5, BF16, DEVICE)
    backend = TritonAttention(config)
    kv_lens = [kv_len] * len(queries)
    decode = queries[0] == 1
    moved = sum(kv_lens) * shape.kv_heads * shape.dim * 4
    copies = min(copies_of(moved), 28)
    slots = (sum(kv_lens) + 15) // 16 * 16 + 1600
    caches = [
        LayerKV(*(torch.randn(slots, shape.kv_heads, shape.dim, dtype=BF16, device=DEVICE) for _ in range(2)))
        for _ in range(copies)
    ]
    ctx = context(queries, kv_lens, backend, slots)
    backend.plan(ctx)
    q = torch.randn(sum(queries), shape.heads, shape.dim, dtype=BF16, device=DEVICE)
    expected = attention_reference(q, caches[0], ctx, 0)
    count = queries[0]
    pairs = sum(count * (kv_len - count) + count * (count + 1) // 2 for count in queries)
    operations = 4 * shape.heads * shape.dim * pairs
    fill = backend.decode if decode else backend.prefill

    def run(blocks: tuple[int, ...], kv: LayerKV) -> Tensor:
        out = torch.empty_like(q)
        fill(q, kv, ctx, out, blocks=blocks)
        return out

    tuples: list[tuple[int, ...]] = []
    if tried and decode:
        most = backend._programs // (len(queries) * shape.kv_heads)
        splits = [s for s in (1, 4, 8, 16, 32, 64) if s <= most and s <= 2 * -(-kv_len // 32)]
        tuples += itertools.product(splits, (32, 64, 128), (2, 4), (1, 2, 3))
    elif tried:
        tuples += [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3),
                   (128, 128, 8, 2), (128, 32, 8, 3), (128, 64, 4, 2), (64, 32, 4, 3)]  # fmt: skip
    calls = [("table", functools.partial(run, ()))]
    calls += [(str(blocks), functools.partial(run, blocks)) for blocks in tuples]
    report.candidates(
        f"attention {model} batch {len(queries)} queries {count} kv {kv_len} splits {backend._splits}",
        calls,
        caches,
        expected,
        moved=moved,
        operations=operations,
        op="decode" if decode else "prefill",
        model=model,
        batch=len(queries),
        queries=count,
        kv=kv_len,
    )


def bench_prep(report: Report, model: str, shape: Shape, tokens: int) -> None:
    width = (shape.heads + 2 * shape.kv_heads) * shape.dim
    qkv = torch.randn(tokens, width, dtype=BF16, device=DEVICE)
    table = torch.randn(40960, shape.dim, device=DEVICE)
    positions = torch.randint(0, 40960, (tokens,), device=DEVICE)
    slots = torch.randperm(tokens + 64, device=DEVICE)[:tokens]
    weights = [torch.randn(shape.dim, dtype=BF16, device=DEVICE) for _ in range(2)]
    size = (tokens + 64, shape.kv_heads, shape.dim)
    caches = [torch.zeros(size, dtype=BF16, device=DEVICE) for _ in range(2)]
    wide = [torch.zeros(size, dtype=torch.float64, device=DEVICE) for _ in range(2)]
    rest = (positions, table, *weights, 1e-6, slots)
    doubles = (positions, table.to(BF16).double(), *(w.double() for w in weights), 1e-6, slots)
    expected = ops.attention_prep(qkv.double(), *doubles, *wide)
    prep = TritonAttentionPrep()
    report.candidates(
        f"prep {model} {tokens} tokens",
        [("table", lambda x: prep(x, *rest, *caches))],
        [qkv] * 20,
        expected,
        moved=2 * qkv.numel() * 2,
        operations=0,
        op="prep",
        model=model,
        tokens=tokens,
    )
